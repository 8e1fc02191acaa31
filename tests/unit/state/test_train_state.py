"""Named parts: what becomes what, in which order, and what is live."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Captured, Part, Stored, Targets
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.sampler import ElasticSampler
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.state.values import SchedulerPart, StatefulPart, ValuePart
from tests.unit.state.roundtrip import load, save


def everything() -> dict[str, Any]:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    return {
        "scheduler": StepLR(optimizer, 3),
        "optimizer": optimizer,
        "sampler": ElasticSampler(4, global_batch=2),
        "history": [1.5],
        "model": model,
        "mine": PerRank({"cursor": 3}),
        "noise": PerRank(StepLR(optimizer, 2)),
    }


def test_values_become_parts_by_what_they_are_in_the_order_to_restore() -> None:
    parts = TrainState(**everything()).parts
    assert {name: type(part) for name, part in parts.items()} == {
        "model": ModelPart,
        "optimizer": OptimizerPart,
        "scheduler": SchedulerPart,
        "sampler": StatefulPart,
        "history": ValuePart,
        "mine": ValuePart,
        "noise": StatefulPart,
        "rng": RngPart,
    }
    assert list(parts)[:2] == ["model", "optimizer"]
    assert list(parts)[-1] == "rng"
    assert {name for name, part in parts.items() if part.capture().per_rank} == {
        "mine",
        "noise",
        "rng",
    }


def test_the_generators_can_be_left_out() -> None:
    assert list(TrainState(rng=None, epoch=1)) == ["epoch"]
    assert list(TrainState()) == ["rng"]


def test_an_empty_dict_is_no_state(tmp_path: Path) -> None:
    # With the generators alone a save would look as if something had been kept.
    with pytest.raises(UsageError, match="the state is an empty dict"):
        TrainState.of({})
    with pytest.raises(UsageError, match="the state is an empty dict"):
        dist_ckpt.save({}, tmp_path / "run", step=1)
    with pytest.raises(UsageError, match="the state is an empty dict"):
        dist_ckpt.Checkpointer(tmp_path / "run", {}, every_steps=1)
    dist_ckpt.save({"epoch": 1}, tmp_path / "run", step=1)
    with pytest.raises(UsageError, match="the state is an empty dict"):
        dist_ckpt.load({}, tmp_path / "run")


def test_values_are_live() -> None:
    given = everything()
    state = TrainState(**given)
    assert state["model"] is given["model"]
    assert state["scheduler"] is given["scheduler"]
    assert state["history"] is given["history"]
    assert state["mine"] == {"cursor": 3}
    saved = save(TrainState(epoch=7).parts["epoch"])
    fresh = TrainState(epoch=0)
    load(fresh.parts["epoch"], saved)
    assert fresh["epoch"] == 7
    with pytest.raises(KeyError):
        state["absent"]


def test_only_plain_values_are_assigned() -> None:
    state = TrainState(best=1.0, model=nn.Linear(1, 1), mine=PerRank(3))
    state["best"] = 0.5
    state["mine"] = 4
    assert (state["best"], state["mine"]) == (0.5, 4)
    assert save(state.parts["best"]).objects == {"value": b"0.5"}
    with pytest.raises(UsageError, match="part 'model' is a Linear"):
        state["model"] = nn.Linear(1, 1)
    with pytest.raises(KeyError):
        state["absent"] = 1


def test_a_whole_state_comes_back() -> None:
    given = everything()
    state = TrainState(**given)
    given["model"](torch.ones(1, 2)).sum().backward()
    given["optimizer"].step()
    given["scheduler"].step()
    given["history"].append(2.5)
    saved = {name: save(part) for name, part in state.parts.items()}
    draws = torch.rand(3)
    fresh = everything()
    other = TrainState(**fresh)
    for name, part in other.parts.items():
        load(part, saved[name])
    assert torch.equal(torch.rand(3), draws)
    assert fresh["history"] == [1.5, 2.5]
    assert torch.equal(fresh["model"].weight, given["model"].weight)
    assert fresh["scheduler"].state_dict() == given["scheduler"].state_dict()


def test_two_models_with_an_optimizer_each() -> None:
    gen, disc = nn.Linear(1, 1), nn.Linear(1, 1)
    state = TrainState(
        opt_g=SGD(gen.parameters()), opt_d=SGD(disc.parameters()), gen=gen, disc=disc
    )
    assert list(state.parts) == ["gen", "disc", "opt_g", "opt_d", "rng"]
    for name in ("opt_g", "opt_d"):
        assert list(state.parts[name].capture().objects) == ["param_groups.weight"]
    both = TrainState(gen=gen, disc=disc, opt=SGD([*gen.parameters(), *disc.parameters()]))
    assert list(both.parts["opt"].capture().objects) == ["param_groups.gen.weight"]


class Mine:
    """A part of the user's own."""

    def capture(self) -> Captured:
        return Captured({}, {})

    def targets(self, stored: Stored) -> Targets:
        return Targets()

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        return


def test_a_part_is_taken_as_it_is() -> None:
    model = ModelPart(nn.Linear(1, 1), name="net")
    mine = Mine()
    optimizer = SGD(model.module.parameters())
    state = TrainState(mine=mine, optimizer=optimizer, model=model)
    assert isinstance(mine, Part)
    assert state.parts["mine"] is mine
    assert list(state.parts) == ["model", "optimizer", "mine", "rng"]
    assert list(state.parts["optimizer"].capture().objects) == ["param_groups.weight"]


def test_of_takes_a_state_or_a_dict() -> None:
    state = TrainState(epoch=1)
    assert TrainState.of(state) is state
    assert list(TrainState.of({"epoch": 1, "rng": None})) == ["epoch"]
    assert list(TrainState.of({"self": 1})) == ["self", "rng"]
    for wrong in ([1], {1: 2}, nn.Linear(1, 1)):
        with pytest.raises(UsageError, match="a state is a TrainState or a dict"):
            TrainState.of(wrong)  # type: ignore[arg-type]


def test_names_of_parts_are_strings() -> None:
    with pytest.raises(UsageError, match="names are strings, and 1 is of type int"):
        TrainState.of({1: nn.Linear(1, 1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "state",
    [
        nn.Linear(2, 1).state_dict(),
        nn.Sequential(nn.Linear(2, 1)).state_dict(),
        dict(nn.Sequential(nn.Linear(2, 1)).state_dict()),
        {**nn.Sequential(nn.Linear(2, 1)).state_dict(), "epoch": 3},
        SGD(nn.Linear(2, 1).parameters(), momentum=0.9).state_dict(),
    ],
)
def test_a_state_dict_is_no_state(state: dict[str, Any], tmp_path: Path) -> None:
    what = "optimizer" if "param_groups" in state else "model"
    says = re.escape(f'Give {{"{what}": {what}}}')
    calls: list[Callable[[], object]] = [
        lambda: TrainState.of(state),
        lambda: dist_ckpt.save(state, tmp_path),
        lambda: dist_ckpt.async_save(state, tmp_path),
        lambda: dist_ckpt.load(state, tmp_path),
        lambda: dist_ckpt.Checkpointer(tmp_path, state),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=says):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_dict_of_tensors_with_plain_names_is_a_state() -> None:
    state = {"weight": torch.ones(1), "bias": torch.ones(1), "rng": None}
    assert list(TrainState.of(state)) == ["weight", "bias"]


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, nn.Linear, torch.optim.lr_scheduler.StepLR, dist_ckpt.Progress]
)
def test_a_class_is_no_part(kind: type) -> None:
    for value in (kind, PerRank(kind)):
        with pytest.raises(UsageError, match=r"part 'it' is \w+, a class, not an object of it"):
            TrainState.of({"it": value})


@pytest.mark.parametrize("name", ["extra", "a.b", "", "1st", "x" * 65])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        TrainState.of({name: 1})


@pytest.mark.parametrize(
    "value", [nn.Linear(1, 1), SGD(nn.Linear(1, 1).parameters()), PerRank(1), Mine()]
)
def test_what_cannot_be_per_rank_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match=r"part 'x': a .* cannot be PerRank"):
        TrainState(x=PerRank(value))


def test_per_rank_values_of_other_ranks_are_refused() -> None:
    state = TrainState(mine=PerRank([1]), loader=PerRank(ElasticSampler(4, global_batch=2)))
    for name in ("mine", "loader"):
        part = state.parts[name]
        with pytest.raises(IncompatibleError, match=f"{name} is kept per rank"):
            part.targets(save(part).stored(rank=0, world_size=1, saved=2))


def test_an_error_in_a_value_names_the_part() -> None:
    with pytest.raises(UsageError, match=r"cannot store stats\.f"):
        TrainState(stats={"f": print}).parts["stats"].capture()
