"""Schedulers: the state of another kind of schedule is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as sched
from torch.optim.swa_utils import SWALR

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.train_state import TrainState
from tests.unit.state.roundtrip import load, save

KINDS = ["lambda", "one_cycle", "cosine", "step", "sequential", "warm_restarts", "plateau", "chain"]


def make(kind: str) -> tuple[SGD, sched.LRScheduler]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5, momentum=0.9)
    match kind:
        case "lambda":
            return optimizer, sched.LambdaLR(optimizer, lambda step: 0.9**step)
        case "one_cycle":
            return optimizer, sched.OneCycleLR(optimizer, max_lr=1.0, total_steps=30)
        case "cosine":
            return optimizer, sched.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.01)
        case "step":
            return optimizer, sched.StepLR(optimizer, step_size=3)
        case "sequential":
            parts = [sched.LinearLR(optimizer), sched.ExponentialLR(optimizer, 0.9)]
            return optimizer, sched.SequentialLR(optimizer, parts, milestones=[4])
        case "warm_restarts":
            return optimizer, sched.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2)
        case "plateau":
            return optimizer, sched.ReduceLROnPlateau(optimizer, patience=1)
    return optimizer, sched.ChainedScheduler(
        [sched.ConstantLR(optimizer), sched.ExponentialLR(optimizer, 0.9)]
    )


def test_a_schedule_of_another_kind_is_refused_before_anything_changes() -> None:
    saved = {kind: save(TrainState(rng=None, s=make(kind)[1]).parts["s"]) for kind in KINDS}
    for theirs in KINDS:
        for ours in KINDS:
            if ours == theirs or {ours, theirs} == {"sequential", "chain"}:
                continue
            part = TrainState(rng=None, s=make(ours)[1]).parts["s"]
            before = part.capture().objects
            with pytest.raises(IncompatibleError, match="s: the checkpoint holds a scheduler with"):
                part.targets(saved[theirs].stored())
            assert part.capture().objects == before


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_averaging_schedule_goes_on_with_its_strategy(strategy: Any, alone: bool) -> None:
    def build(of: Any) -> tuple[SGD, sched.LRScheduler]:
        optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        average = SWALR(optimizer, 0.05, anneal_epochs=9, anneal_strategy=of)
        if alone:
            return optimizer, average
        return optimizer, sched.ChainedScheduler([average], optimizer)

    def rates(optimizer: SGD, schedule: sched.LRScheduler) -> list[float]:
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, schedule = build(strategy)
    rates(optimizer, schedule)
    other, fresh = build("linear" if strategy == "cos" else "cos")
    saved = save(TrainState(rng=None, s=schedule).parts["s"])
    load(TrainState(rng=None, s=fresh).parts["s"], saved)
    other.param_groups[0].update(lr=optimizer.param_groups[0]["lr"], swa_lr=0.05)
    assert rates(other, fresh) == rates(optimizer, schedule)


def nested(kind: str) -> sched.LRScheduler:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    linear, cosine = sched.LinearLR(optimizer), sched.CosineAnnealingLR(optimizer, 5)
    exponential = sched.ExponentialLR(optimizer, 0.9)
    match kind:
        case "linear, cosine":
            return sched.SequentialLR(optimizer, [linear, cosine], milestones=[2])
        case "linear, exponential":
            return sched.SequentialLR(optimizer, [linear, exponential], milestones=[2])
        case "cosine, linear":
            return sched.SequentialLR(optimizer, [cosine, linear], milestones=[2])
        case "three":
            return sched.SequentialLR(optimizer, [linear, cosine, exponential], milestones=[2, 3])
        case "chained linear, cosine":
            return sched.ChainedScheduler([linear, cosine])
        case "chained linear, exponential":
            return sched.ChainedScheduler([linear, exponential])
    return sched.ChainedScheduler([cosine, linear])


NESTED = [
    *("linear, cosine", "linear, exponential", "cosine, linear", "three"),
    *("chained linear, cosine", "chained linear, exponential", "chained cosine, linear"),
]


@pytest.mark.parametrize("told", [True, False], ids=["with its kind", "of an older release"])
def test_a_schedule_made_of_others_is_refused(told: bool) -> None:
    for theirs in NESTED:
        saved = save(TrainState(rng=None, s=nested(theirs)).parts["s"])
        objects = {name: data for name, data in saved.objects.items() if told or name == "value"}
        stored = replace(saved, objects=objects).stored()
        for ours in NESTED:
            part = TrainState(rng=None, s=nested(ours)).parts["s"]
            if ours == theirs:
                assert not part.targets(stored).unexpected
                continue
            with pytest.raises(IncompatibleError, match="holds a scheduler with"):
                part.targets(stored)


def test_classes_with_the_same_settings_are_told_apart() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    product = sched.MultiplicativeLR(optimizer, lambda step: 0.9)
    saved = save(TrainState(rng=None, s=product).parts["s"]).stored()
    part = TrainState(rng=None, s=sched.LambdaLR(optimizer, lambda step: 0.9**step)).parts["s"]
    with pytest.raises(IncompatibleError, match=r"settings of a MultiplicativeLR.* this LambdaLR"):
        part.targets(saved)


@pytest.mark.parametrize("told", [True, False], ids=["with its kind", "of an older release"])
def test_an_attribute_of_the_program_is_no_setting(told: bool) -> None:
    for extra in ("saved", "live"):
        one: Any = make("cosine")[1]
        other: Any = make("cosine")[1]
        (one if extra == "saved" else other).note = "mine"
        saved = save(TrainState(rng=None, s=one).parts["s"])
        objects = {name: data for name, data in saved.objects.items() if told or name == "value"}
        load(TrainState(rng=None, s=other).parts["s"], replace(saved, objects=objects))
        assert other.T_max == 9
        assert other.note == "mine"


def test_a_class_of_the_program_may_be_renamed() -> None:
    class Warm(sched.LRScheduler):
        def __init__(self, optimizer: SGD, steps: int) -> None:
            self.steps = steps
            super().__init__(optimizer)

        def get_lr(self) -> list[float | torch.Tensor]:
            return [0.1 * min(self.last_epoch, self.steps)]

    class Warmer(Warm):
        pass

    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    saved = save(TrainState(rng=None, s=Warm(optimizer, 3)).parts["s"])
    load(TrainState(rng=None, s=Warmer(optimizer, 5)).parts["s"], saved)
    cosine = TrainState(rng=None, s=sched.CosineAnnealingLR(optimizer, 5)).parts["s"]
    with pytest.raises(IncompatibleError, match="build the Warm that was saved"):
        cosine.targets(saved.stored())
