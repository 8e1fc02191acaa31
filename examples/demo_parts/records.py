"""What the workers wrote down, read back as plain values.

Two kinds of JSON lines: the logs of `train_gpt.py` (losses, sample ids) and the diaries of
`worker.py` (what happened to checkpoints). Both are only ever appended to, so a run that was
killed and restarted has several starts in one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class RecordError(Exception):
    """A log contradicts itself or cannot be read; the message names the place."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One step in a log: its number, what was logged, and when (Unix seconds)."""

    step: int
    value: T
    time: float


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """One start of the training program, and the steps it took."""

    resumed: int
    layout: str
    world_size: int
    time: float
    entries: list[Entry[T]]


@dataclass(frozen=True, slots=True)
class Note:
    """One line of a diary.

    Attributes:
        what: `start`, `killed`, `digests`, `end`, or the name of a dist_ckpt event.
        rank: who wrote it.
        attempt: 0 for the first start of the workers, 1 after one restart.
        time: Unix seconds.
        values: the rest of the line.
    """

    what: str
    rank: int
    attempt: int
    time: float
    values: Mapping[str, Any]


def read_losses(file: Path) -> list[Attempt[str]]:
    """Read the losses that rank 0 logged, as the hexadecimal floats of `float.hex`."""
    return _read_attempts(file, lambda line: str(line["loss"]))


def read_samples(file: Path) -> list[Attempt[tuple[int, ...]]]:
    """Read the sample ids that one rank logged."""
    return _read_attempts(file, lambda line: tuple(int(sample) for sample in line["samples"]))


def read_diary(file: Path) -> list[Note]:
    """Read what one rank noted."""
    return [
        Note(
            what=line.pop("what"),
            rank=line.pop("rank"),
            attempt=line.pop("attempt"),
            time=line.pop("time"),
            values=line,
        )
        for line in _read_lines(file)
    ]


def standing(attempts: Sequence[Attempt[T]]) -> list[Entry[T]]:
    """Return the history that stands: a restart undoes all steps after the one it resumed from.

    Raises:
        RecordError: the steps of an attempt are not consecutive, or it resumed from a step that
            was never reached.
    """
    history: list[Entry[T]] = []
    for attempt in attempts:
        reached = history[-1].step if history else attempts[0].resumed
        if attempt.resumed > reached:
            raise RecordError(
                f"resumed from step {attempt.resumed}, but only {reached} was reached"
            )
        history = [entry for entry in history if entry.step <= attempt.resumed]
        for step, entry in enumerate(attempt.entries, attempt.resumed + 1):
            if entry.step != step:
                raise RecordError(f"step {step} should follow, but step {entry.step} was logged")
            history.append(entry)
    return history


def undone(attempts: Sequence[Attempt[T]]) -> list[Entry[T]]:
    """Return the steps that were taken and lost, because a restart resumed from before them."""
    return [
        entry
        for attempt, following in pairwise(attempts)
        for entry in attempt.entries
        if entry.step > following.resumed
    ]


def _read_attempts(file: Path, value: Callable[[Mapping[str, Any]], T]) -> list[Attempt[T]]:
    attempts: list[Attempt[T]] = []
    for line in _read_lines(file):
        try:
            if "resumed" in line:
                setup = (line["resumed"], line["layout"], line["world_size"], line["time"])
                attempts.append(Attempt(*setup, entries=[]))
            else:
                attempts[-1].entries.append(Entry(line["step"], value(line), line["time"]))
        except (IndexError, KeyError) as error:
            raise RecordError(f"{file}: unexpected line {line}") from error
    return attempts


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} cannot be read: {error}") from error
