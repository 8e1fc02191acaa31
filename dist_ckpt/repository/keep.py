"""What to keep: pure values that name the checkpoints worth keeping, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_ckpt.errors import UsageError


class KeepPolicy(Protocol):
    """Decides by the committed steps alone: no files, no clock."""

    def kept(self, steps: Sequence[int]) -> Mapping[int, str]:
        """Return the reason to keep for each of `steps` (ascending) that this policy wants."""
        ...


@dataclass(frozen=True, slots=True)
class _Latest:
    count: int

    def __str__(self) -> str:
        return f"keep.latest({self.count})"

    def kept(self, steps: Sequence[int]) -> Mapping[int, str]:
        newest_first = sorted(steps, reverse=True)[: self.count]
        return {step: f"latest #{rank}" for rank, step in enumerate(newest_first, start=1)}


def latest(count: int) -> KeepPolicy:
    """Keep the newest `count` checkpoints.

    Raises:
        UsageError: `count` is not a positive integer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"keep.latest takes a positive number of checkpoints, not {count!r}")
    return _Latest(count)
