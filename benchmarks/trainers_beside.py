"""One training by several ways to save it, in turn, and what each of them costs."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch.distributed.checkpoint.api import CheckpointException

from benchmarks.measure import say, verdict
from dist_ckpt.format.names import parse_step_dir

STALL_TARGET = 1.0

STEPS, EVERY = 8, 2
"""How long each training is, in steps, and how often it saves."""

# The first save of ours plans and takes its memory.
_EARLY = 1
_MIB = 1 << 20


@dataclass(slots=True)
class Clock:
    """Takes the time that the saves of one training hold it up."""

    blocked: list[float] = field(default_factory=list)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Take the time of one save, until the training goes on."""
        begun = time.perf_counter()
        yield
        self.blocked.append(time.perf_counter() - begun)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to save a training.

    Attributes:
        name: of the way.
        train: trains for `STEPS` into a folder, and returns when what it saved is there.
        newest: returns the file or folder of the newest checkpoint below that folder.
        resume: goes on as its users do after a crash; returns the step it went on from.
        ours: whether it is held to the target.
    """

    name: str
    train: Callable[[Path, Clock], object]
    newest: Callable[[Path], Path]
    resume: Callable[[Path], int]
    ours: bool = False


def beside(what: str, sides: Sequence[Side], place: Path, *, repeats: int) -> bool:
    """Print what each of `sides` costs, the first one being what the others are compared with.

    Args:
        what: is trained.
        sides: the framework's own way, then others.
        place: an empty folder.
        repeats: how often each of them trains, in turn, to and fro.

    Returns:
        Whether those of ours hold up the training no longer than the first.
    """
    blocked: dict[str, list[float]] = {side.name: [] for side in sides}
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(repeats):
        for side in sides if number % 2 else reversed(sides):
            out = place / side.name.replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            clock, begun = Clock(), time.perf_counter()
            side.train(out, clock)
            seconds[side.name].append(time.perf_counter() - begun)
            blocked[side.name] += clock.blocked[_EARLY:]
    say(f"\n{what}, {STEPS // EVERY} saves in {STEPS} steps, medians of {repeats} trainings")
    width = max(len(side.name) for side in sides)
    own = sides[0].name
    met = True
    for side in sides:
        out = place / side.name.replace(" ", "-")
        size = _bytes_of(side.newest(out))
        say(
            f"  {side.name:{width}}  blocked {median(blocked[side.name]):8.4f} s a save "
            f"({min(blocked[side.name]):.4f} to {max(blocked[side.name]):.4f}), "
            f"{median(seconds[side.name]):6.2f} s in all, {size / _MIB:8.2f} MiB; "
            f"newest cut in half: {_after_a_torn_one(side, out)}"
        )
        shutil.rmtree(out)
    for side in sides:
        if side.ours:
            ratio = median(blocked[side.name]) / median(blocked[own])
            met &= verdict(f"seconds blocked, {side.name} / {own}", ratio, target=STALL_TARGET)
    return met


def newest_step(run: Path) -> Path:
    """Return the newest step directory of a run of ours."""
    return max(each for each in run.iterdir() if parse_step_dir(each.name) is not None)


def newest_numbered(out: Path, pattern: str) -> Path:
    """Return what matches `pattern` in `out` and has the highest number at the end of its name."""

    def number(each: Path) -> int:
        found = re.search(r"\d+$", each.stem)
        return int(found[0]) if found else -1

    return max(out.glob(pattern), key=number)


def _files_of(checkpoint: Path) -> list[Path]:
    if checkpoint.is_file():
        return [checkpoint]
    return [file for file in checkpoint.rglob("*") if file.is_file()]


def _bytes_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in _files_of(checkpoint))


def _after_a_torn_one(side: Side, out: Path) -> str:
    """Cut the largest file of the newest checkpoint in half, go on, and say what came of it."""
    largest = max(_files_of(side.newest(out)), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    try:
        step = side.resume(out)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        return f"{type(error).__name__}, the training does not start"
    return f"goes on from step {step}"
