"""Schedulers: the state of another kind of schedule is refused."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as sched

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.train_state import TrainState
from tests.unit.state.roundtrip import save

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
