"""Several modules as one part, and objects with `get_state` and `set_state`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.train_state import main_model

Modules = Any


def two() -> list[nn.Module]:
    return [nn.Linear(3, 2), nn.BatchNorm1d(2)]


def as_list() -> Modules:
    return two()


def as_dict() -> Modules:
    return dict(zip(("gen", "disc"), two(), strict=True))


def modules_of(several: Modules) -> list[nn.Module]:
    return [*several.values()] if isinstance(several, dict) else [*several]


def trained(several: Modules) -> torch.optim.Optimizer:
    first, second = modules_of(several)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    second(first(torch.randn(4, 3))).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [as_list, as_dict])
def test_several_modules_are_one_part(make: Callable[[], Modules], tmp_path: Path) -> None:
    saved, loaded = make(), make()
    optimizers = [trained(saved), trained(loaded)]
    dist_ckpt.save({"model": saved, "optimizer": optimizers[0]}, tmp_path)
    weight = modules_of(loaded)[0].weight
    dist_ckpt.load({"model": loaded, "optimizer": optimizers[1]}, tmp_path)
    for left, right in zip(modules_of(saved), modules_of(loaded), strict=True):
        torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(*(each.state_dict()["state"] for each in optimizers), rtol=0, atol=0)
    assert modules_of(loaded)[0].weight is weight


def test_they_are_called_as_the_module_that_would_hold_them(tmp_path: Path) -> None:
    saved = as_dict()
    state = dist_ckpt.TrainState(model=saved)
    assert state["model"] is saved
    assert main_model(state) == "model"
    dist_ckpt.save(state, tmp_path)
    whole = nn.ModuleDict(as_dict())
    dist_ckpt.load({"model": whole}, tmp_path)
    assert torch.equal(whole["gen"].get_parameter("weight"), saved["gen"].weight)
    one = nn.Linear(3, 2)
    dist_ckpt.load({"model": {"gen": one}}, tmp_path, only="model/gen.*")
    assert torch.equal(one.weight, saved["gen"].weight)


def test_only_what_is_trained_of_several(tmp_path: Path) -> None:
    frozen, adapter = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    state = dist_ckpt.TrainState(trainable_only=True, model=[frozen, adapter])
    assert state.parts["model"].capture().tensors.keys() == {"1.weight", "1.bias"}


def test_one_that_is_exchanged_later_is_told(tmp_path: Path) -> None:
    several = as_dict()
    state = dist_ckpt.TrainState(model=several)
    several["disc"] = nn.BatchNorm1d(2)
    with pytest.raises(UsageError, match=r"'model' has other modules than it had, under disc"):
        dist_ckpt.save(state, tmp_path)


@pytest.mark.parametrize("key", ["", "a.b", "forward"])
def test_keys_that_no_submodule_can_have(key: str) -> None:
    with pytest.raises(UsageError, match=r"part 'model': a module cannot be called"):
        dist_ckpt.TrainState(model={key: nn.Linear(1, 1)})


def test_several_are_not_per_rank_and_none_is_no_module() -> None:
    with pytest.raises(UsageError, match=r"cannot be PerRank"):
        dist_ckpt.TrainState(model=dist_ckpt.PerRank(two()))
    state = dist_ckpt.TrainState(history=[], notes={})
    assert state.parts["history"].capture().tensors == {}


class Environment:
    """Says its state by other names than those of torch."""

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.memory = torch.full((3,), float(seen))

    def get_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "memory": self.memory}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["seen"] < 0:
            raise ValueError("none was seen")
        self.seen, self.memory = state["seen"], state["memory"]


def test_what_get_state_returns_set_state_gets(tmp_path: Path) -> None:
    dist_ckpt.save({"env": Environment(7)}, tmp_path, step=1)
    state = dist_ckpt.TrainState(env=Environment(0))
    dist_ckpt.load(state, tmp_path)
    assert state["env"].seen == 7
    assert state["env"].memory.tolist() == [7.0] * 3

    dist_ckpt.save({"env": Environment(-1)}, tmp_path, step=2)
    with pytest.raises(IncompatibleError, match=r"Environment\.set_state refused .* none was seen"):
        dist_ckpt.load(state, tmp_path, step=2)


def test_of_each_rank_its_own(tmp_path: Path) -> None:
    dist_ckpt.save({"env": dist_ckpt.PerRank(Environment(7))}, tmp_path)
    one = Environment(0)
    dist_ckpt.load({"env": dist_ckpt.PerRank(one)}, tmp_path)
    assert one.seen == 7


class Registered(Environment):
    pass


def test_what_is_registered_is_stored_as_what_it_is(tmp_path: Path) -> None:
    dist_ckpt.register_type(
        Registered, name="several_registered", encode=lambda v: v.seen, decode=Registered
    )
    dist_ckpt.save({"env": Registered(5)}, tmp_path)
    state = dist_ckpt.TrainState(env=Registered(0))
    dist_ckpt.load(state, tmp_path)
    assert state["env"].seen == 5
