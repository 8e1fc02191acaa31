"""Optimizers that share, count and number in ways of their own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.storage.memory import MemoryStore


class Shares(Optimizer):
    """Has one tensor for all parameters, which counts the steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [each for group in self.param_groups for each in group["params"]]
        count = self.state[parameters[0]].setdefault("step", torch.zeros(()))
        count += 1
        for each in parameters:
            self.state[each]["step"] = self.state[each].get("step", count)
            with torch.no_grad():
                each.sub_(each.grad, alpha=0.1 / float(self.state[each]["step"]))


class Told(Shares):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "version": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "version"})


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [Shares, Told])
@pytest.mark.parametrize("begun", [False, True])
def test_one_tensor_of_several_parameters_stays_one(kind: type[Shares], *, begun: bool) -> None:
    store = MemoryStore(f"unit-shares-{kind.__name__}-{begun}")
    whole, fresh = net(0), net(1)
    first, second = kind(whole.parameters()), kind(fresh.parameters())
    for _ in range(3):
        step(whole, first)
    dist_ckpt.save({"model": whole, "optimizer": first}, store)
    if begun:
        step(fresh, second)
    dist_ckpt.load({"model": fresh, "optimizer": second}, store)
    assert len({id(entry["step"]) for entry in second.state.values()}) == 1
    for _ in range(3):
        step(whole, first)
        step(fresh, second)
    assert [p.tolist() for p in fresh.parameters()] == [p.tolist() for p in whole.parameters()]


class ById(SGD):
    """Keeps state by a number that is the place of a parameter in memory."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for each in group["params"]:
                self.state[id(each)] = {"seen": torch.ones(())}  # type: ignore[index]


class ByIdTold(ById):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "version": 1}


@pytest.mark.parametrize("kind", [ById, ByIdTold])
def test_state_under_the_id_of_a_parameter_is_refused_by_its_name(kind: type[ById]) -> None:
    model = net(0)
    optimizer = kind(model.parameters(), lr=0.1)
    step(model, optimizer)
    with pytest.raises(UsageError, match=r"keeps state for 0\.weight by id\(parameter\)"):
        dist_ckpt.save({"model": model, "optimizer": optimizer}, MemoryStore("unit-by-id"))


class Counts(SGD):
    """Counts in attributes, of which one is set where `step` calls it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.calls, self.every, self.ready, self.seconds = 0, 5, False, 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.ready = True
        self._count()
        super().step(closure)

    def _count(self) -> None:
        self.calls += 1
        self.seconds += 0.5


class CountsTold(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "calls"})


class _Refuses:
    """A property of an instance alone, as a lazy one may be."""

    def __get__(self, instance: object, owner: type) -> int:
        if instance is None:
            raise RuntimeError("ask an optimizer, and not its class")
        return 1


class CountsBehindAProperty(Counts):
    each = _Refuses()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += self.each
        super().step(closure)


class Draws(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.numbers = random.Random(0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Counts, "Counts counts or draws in calls, seconds, which its state_dict() does not tell"),
        (CountsBehindAProperty, "CountsBehindAProperty counts or draws in calls"),
        (Draws, "Draws counts or draws in numbers, which"),
        (CountsTold, ""),
        (SGD, ""),
    ],
)
def test_numbers_that_a_state_dict_does_not_tell_are_named_once(
    kind: type[SGD], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(0)
    optimizer = kind(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with dist_ckpt.Checkpointer(MemoryStore(f"unit-{kind.__name__}"), state, every_steps=1) as ckpt:
        for number in (1, 2):
            step(model, optimizer)
            ckpt.step(number)
    assert caplog.text.count(said or "counts or draws") == bool(said)
