"""torchtitan's checkpoint manager and ours, with its containers; its trainer needs a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in its stubs
from torchtitan.components.checkpointer import BaseCheckpointManager, CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from benchmarks.trainers_beside import (
    EVERY,
    STEPS,
    Clock,
    Side,
    beside,
    newest_numbered,
    newest_step,
)
from benchmarks.workload import Weights
from dist_ckpt.integrations.torchtitan import DistCkptManager

_Config = Callable[..., BaseCheckpointManager.Config]


def measure(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure its ways that need no GPU, and ours; all checkpoints are kept."""
    theirs = partial(CheckpointManager.Config, last_save_model_only=False)
    newest_folder = partial(newest_numbered, pattern="step-*")
    ways: dict[str, tuple[_Config, Callable[[Path], Path]]] = {
        "torchtitan": (theirs, newest_folder),
        "torchtitan async": (partial(theirs, async_mode="async"), newest_folder),
        "dist_ckpt": (DistCkptManager.Config, newest_step),
    }
    sides = [
        Side(
            name,
            partial(_train, config, chosen.scale),
            newest,
            partial(_resume, config, chosen.scale),
            ours=name.startswith("dist_ckpt"),
        )
        for name, (config, newest) in ways.items()
    ]
    with _one_rank():
        return beside("torchtitan, whole model", sides, place, repeats=chosen.repeats)


@contextmanager
def _one_rank() -> Iterator[None]:
    # Its asynchronous saves want a process group of gloo, of one rank too.
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Progress:
    """What the trainer says of itself."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class _Training:
    def __init__(self, config: _Config, scale: float, out: Path) -> None:
        torch.manual_seed(0)
        self.model = Weights(scale)
        stepper = default_adamw(lr=0.001)
        stepper.implementation = "for-loop"
        self.optimizers = stepper.build(model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=STEPS)
        self.progress = _Progress()
        options: Any = {"enable": True, "folder": str(out), "interval": EVERY, "keep_latest_k": 0}
        self.manager = config(**options).build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.progress},
            sd_adapter=None,
            base_folder="",
        )


def _train(config: _Config, scale: float, out: Path, clock: Clock) -> None:
    training = _Training(config, scale, out)
    training.manager.load()
    while training.progress.step < STEPS:
        training.progress.step += 1
        for parameter in training.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        training.manager.maybe_wait_for_staging()
        training.optimizers.step()
        training.optimizers.zero_grad()
        training.schedulers.step()
        if training.progress.step % EVERY == 0:
            with clock.saving():
                training.manager.save(training.progress.step)
    training.manager.maybe_wait_for_saving()
    training.manager.close()


def _resume(config: _Config, scale: float, out: Path) -> int:
    training = _Training(config, scale, out)
    try:
        training.manager.load()
    finally:
        training.manager.close()
    return training.progress.step
