"""`Accelerator.save_state` and ours, in a loop of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from benchmarks.trainers_beside import (
    EVERY,
    STEPS,
    Clock,
    Side,
    beside,
    newest_numbered,
    newest_step,
)
from benchmarks.trainers_transformers import gpt2, rows
from dist_ckpt import Checkpointer
from dist_ckpt.integrations.accelerate import state_of

# Gives what saves a step, and what goes on from the newest one and returns its number.
_Way = Callable[[Accelerator, Path], AbstractContextManager[tuple[Any, Any]]]


def measure(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure both, with checkpoints that are numbered and all kept."""
    ways: dict[str, tuple[_Way, Callable[[Path], Path]]] = {
        "accelerate": (_theirs, partial(newest_numbered, pattern="checkpoints/*")),
        "dist_ckpt": (_ours, newest_step),
    }
    sides = [
        Side(
            name,
            partial(_train, way, chosen.scale),
            newest,
            partial(_resume, way, chosen.scale),
            ours=way is _ours,
        )
        for name, (way, newest) in ways.items()
    ]
    return beside("accelerate, whole model", sides, place, repeats=chosen.repeats)


def _prepared(out: Path, scale: float) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(str(out), automatic_checkpoint_naming=True),
    )
    model = gpt2(scale)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def _train(way: _Way, scale: float, out: Path, clock: Clock) -> None:
    accelerator, model, optimizer = _prepared(out, scale)
    with way(accelerator, out) as (save, _):
        for step, row in enumerate(rows(), start=1):
            batch = row[None]
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                with clock.saving():
                    save(step)


def _resume(way: _Way, scale: float, out: Path) -> int:
    accelerator, _, _ = _prepared(out, scale)
    with way(accelerator, out) as (_, restore):
        step: int = restore()
        return step


@contextmanager
def _theirs(accelerator: Accelerator, out: Path) -> Iterator[tuple[Any, Any]]:
    def restore() -> int:
        accelerator.load_state()
        return STEPS

    yield lambda step: accelerator.save_state(), restore


@contextmanager
def _ours(accelerator: Accelerator, out: Path) -> Iterator[tuple[Any, Any]]:
    with Checkpointer(str(out), state_of(accelerator)) as ckpt:
        yield ckpt.save, ckpt.restore
