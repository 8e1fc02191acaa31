"""What can refuse is asked before anything changes; what is not stored is said."""

from __future__ import annotations

import logging
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.state.roundtrip import save

_stores = count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-order-{next(_stores)}")


class Meter:
    """Refuses what is not even, and keeps a tensor if it is told to."""

    def __init__(self, n: int) -> None:
        self.n = n

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["n"] % 2:
            raise ValueError("odd")
        self.n = state["n"]


REFUSALS: dict[str, tuple[Any, Any]] = {
    "sampler": (
        lambda: dist_ckpt.ElasticSampler(8, global_batch=2),
        lambda: dist_ckpt.ElasticSampler(9, global_batch=2),
    ),
    "early stopping": (
        lambda: dist_ckpt.EarlyStopping("val/loss", patience=1),
        lambda: dist_ckpt.EarlyStopping("val/other", patience=1),
    ),
    "one's own": (lambda: Meter(3), lambda: Meter(0)),
    "one's own per rank": (lambda: PerRank(Meter(3)), lambda: PerRank(Meter(0))),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_refuses_does_so_before_a_weight_changes(kind: str) -> None:
    first, second = REFUSALS[kind]
    store = new_store()
    model, history = nn.Linear(2, 2), [1]
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    dist_ckpt.save({"a": first(), "z": model, "opt": optimizer, "history": history}, store)
    other, mine = nn.Linear(2, 2), [0]
    before = other.weight.detach().clone()
    steps = SGD(other.parameters(), lr=0.25, momentum=0.9)
    draws = torch.get_rng_state()
    with pytest.raises(IncompatibleError) as caught:
        dist_ckpt.load({"a": second(), "z": other, "opt": steps, "history": mine}, store)
    assert "partly restored" not in str(caught.value)
    assert torch.equal(other.weight, before)
    assert steps.param_groups[0]["lr"] == 0.25
    assert mine == [0]
    assert torch.equal(torch.get_rng_state(), draws)


def test_one_that_is_asked_first_is_asked_once_and_loaded_once() -> None:
    class Careful(Meter):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.calls: list[str] = []

        def check_state_dict(self, state: dict[str, Any]) -> None:
            self.calls.append("check")
            if state["n"] > 10:
                raise ValueError("too much")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls.append("load")
            super().load_state_dict(state)

    store = new_store()
    dist_ckpt.save({"m": Careful(4)}, store)
    other = Careful(0)
    dist_ckpt.load({"m": other}, store)
    assert (other.calls, other.n) == (["check", "load"], 4)
    dist_ckpt.save({"m": Careful(14)}, store, step=1)
    with pytest.raises(IncompatibleError, match="too much"):
        dist_ckpt.load({"m": other}, store)
    assert other.calls == ["check", "load", "check"]


def test_one_that_refuses_tensors_says_what_became_of_the_state() -> None:
    class Heavy(Meter):
        def state_dict(self) -> dict[str, Any]:
            return {"n": self.n, "sum": torch.ones(2)}

    store = new_store()
    dist_ckpt.save({"m": Heavy(3)}, store)
    with pytest.raises(IncompatibleError, match="may be partly restored"):
        dist_ckpt.load({"m": Heavy(0)}, store)


def test_a_value_of_a_type_that_is_not_known_here_is_found_first() -> None:
    class Odd:
        pass

    state: dict[str, Any] = {"m": nn.Linear(1, 1), "x": {"odd": 1}}
    store = new_store()
    dist_ckpt.register_type(Odd, name="test_order.Odd", encode=lambda _: 1, decode=_refuse)
    dist_ckpt.save({**state, "x": {"odd": Odd()}}, store)
    before = state["m"].weight.detach().clone()
    with pytest.raises(IncompatibleError, match="not today") as caught:
        dist_ckpt.load(state, store)
    assert "partly restored" not in str(caught.value)
    assert torch.equal(state["m"].weight, before)


def _refuse(plain: Any) -> Any:
    raise ValueError("not today")


# ------------------------------------------------------------------ said once


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dist_ckpt"]


def test_a_part_without_content_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Meter):
        def state_dict(self) -> Any:
            self.n += 1  # and no return

    frozen = nn.Linear(1, 1).requires_grad_(False)
    states: list[dict[str, Any]] = [
        {"model": nn.ReLU()},
        {"model": frozen, "trainable_only": True},
        {"model": Forgetful(1)},
    ]
    for state in states:
        caplog.clear()
        with dist_ckpt.Checkpointer(new_store(), state) as ckpt:
            ckpt.save(1)
            ckpt.save(2)
        (line,) = lines(caplog)
        assert "part 'model'" in line
        assert "nothing is stored for it" in line
    again = {"model": nn.ReLU(), "n": 1}
    store = new_store()
    dist_ckpt.save(again, store)
    assert dist_ckpt.load(again, store).parts == ("model", "n", "rng")


def net() -> tuple[nn.Module, SGD]:
    model = nn.Linear(2, 1)
    return model, SGD(model.parameters(), lr=0.1)


def backward(model: nn.Module) -> None:
    model(torch.ones(1, 2)).sum().backward()


def test_gradients_that_no_step_used_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = net()
    with dist_ckpt.Checkpointer(new_store(), {"model": model, "optimizer": optimizer}) as ckpt:
        backward(model)
        optimizer.step()
        ckpt.save(1)  # used, though still there
        optimizer.zero_grad(set_to_none=False)
        ckpt.save(2)
        optimizer.zero_grad()
        ckpt.save(3)
        assert not lines(caplog)
        backward(model)
        ckpt.save(4)
        backward(model)
        ckpt.save(5)
    (line,) = lines(caplog)
    assert "gradients that no optimizer step has used" in line


def test_gradients_before_the_first_step_are_named_too(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = net()
    with dist_ckpt.Checkpointer(new_store(), {"model": model, "optimizer": optimizer}) as ckpt:
        backward(model)
        ckpt.save(1)
    assert len(lines(caplog)) == 1


def test_a_single_save_after_a_step_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = net()
    backward(model)
    optimizer.step()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        dist_ckpt.save({"model": model, "optimizer": optimizer}, new_store())
    assert not lines(caplog)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_compiled_step_is_compiled_no_more_often_in_a_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def graphs(*, kept: bool) -> int:
        compiled: list[Any] = []

        def backend(graph: Any, _: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        torch.compiler.reset()
        model, optimizer = net()
        step: Any = torch.compile(optimizer.step, backend=backend)
        if kept:
            TrainState(model=model, optimizer=optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            step()
        dist_ckpt.save({"model": model, "optimizer": optimizer}, new_store())
        return len(compiled)

    once = graphs(kept=False)
    assert graphs(kept=True) == once
    assert not lines(caplog), "no gradients are pending"


# ------------------------------------------------------------------ what is trained


class Counting(nn.Module):
    """Frozen, with buffers that a forward pass writes in place, and exchanges."""

    total: torch.Tensor
    count: torch.Tensor
    fixed: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("fixed", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.detach().sum(0)
        self.count = self.count + 1
        return x * self.weight


def adapted() -> Any:
    base = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.SyncBatchNorm(2))
    return nn.Sequential(base.requires_grad_(False), Counting(), nn.Linear(2, 2))


def test_what_training_changes_of_a_frozen_base_is_kept() -> None:
    model = adapted()
    state = TrainState(model=model, trainable_only=True, rng=None)
    statistics = {f"0.{i}.{name}" for i in (1, 2) for name, _ in model[0][i].named_buffers()}
    always = {"2.weight", "2.bias"} | statistics
    assert save(state.parts["model"]).tensors.keys() == always
    model[1](torch.ones(3, 2))
    model[0][1](torch.randn(3, 2))
    assert save(state.parts["model"]).tensors.keys() == always | {"1.total", "1.count"}
    store = new_store()
    dist_ckpt.save(state, store)
    other = adapted()
    fixed = other[0][0].weight.detach().clone()
    dist_ckpt.load(TrainState(model=other, trainable_only=True, rng=None), store)
    assert torch.equal(other[0][1].running_mean, model[0][1].running_mean)
    assert other[1].total.tolist() == [3, 3]
    assert other[1].count == 1
    assert torch.equal(other[0][0].weight, fixed)


def test_what_was_kept_of_a_frozen_base_is_kept_after_a_resume() -> None:
    model = adapted()
    first, second = new_store(), new_store()
    state = TrainState(model=model, trainable_only=True, rng=None)
    model[1](torch.ones(3, 2))
    dist_ckpt.save(state, first)
    resumed = TrainState(model=adapted(), trainable_only=True, rng=None)
    dist_ckpt.load(resumed, first)
    dist_ckpt.save(resumed, second)  # nothing has changed it in between, as in evaluation
    last = adapted()
    dist_ckpt.load(TrainState(model=last, trainable_only=True, rng=None), second)
    assert last[1].total.tolist() == [3, 3]
    assert last[1].count == 1


def test_a_checkpoint_without_the_statistics_of_a_frozen_base_loads() -> None:
    model = adapted()
    weights = {name: value for name, value in model.state_dict().items() if name.startswith("2.")}
    store = new_store()
    dist_ckpt.save({"model": weights}, store)
    other = adapted()
    dist_ckpt.load(TrainState(model=other, trainable_only=True, rng=None), store, skip=["rng"])
    assert torch.equal(other[2].weight, model[2].weight)
