"""Which of several measured things is the best, said once for saving, keeping and stopping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from dist_ckpt.errors import ErrorKind, NotFound, UsageError, near
from dist_ckpt.format.names import is_text

Mode = Literal["min", "max"]

_MOST_NAMED = 8


class Measured(Protocol):
    """Something with a step and metrics."""

    @property
    def step(self) -> int:
        """The training step."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers by name."""
        ...


MeasuredT = TypeVar("MeasuredT", bound=Measured)


@dataclass(frozen=True, slots=True)
class Criterion:
    """A metric, and whether small or large values of it are good.

    Attributes:
        metric: its name in the `metrics` of a checkpoint.
        mode: "min" when smaller is better, "max" when larger is.

    Raises:
        UsageError: no name, or another mode.
    """

    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if not is_text(self.metric) or not self.metric:
            raise UsageError(f"a metric has a name such as 'val/loss', not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise UsageError(f"mode is 'min' or 'max', not {self.mode!r}")

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """Return what `NAME`, `NAME:min` or `NAME:max` says.

        Raises:
            UsageError: there is no name.
        """
        # A metric may have colons in its name: only the last one can say how it is meant.
        name, colon, mode = text.rpartition(":")
        if colon and mode in ("min", "max"):
            return cls(name, "max" if mode == "max" else "min")
        return cls(text)

    def __str__(self) -> str:
        return f"{'lowest' if self.mode == 'min' else 'highest'} {self.metric}"

    def beats(self, value: float, best: float | None, *, min_delta: float = 0.0) -> bool:
        """Tell whether `value` is better than `best` by more than `min_delta`.

        Any number is better than None; NaN is better than nothing.
        """
        if math.isnan(value):
            return False
        if best is None:
            return True
        # Strictly: of equal ones the older stays the best.
        gain = best - value if self.mode == "min" else value - best
        return gain > min_delta

    def ranked(self, candidates: Iterable[MeasuredT]) -> list[MeasuredT]:
        """Return those that have the metric, the best first, and of equal ones the older first."""
        sign = 1.0 if self.mode == "min" else -1.0
        # NaN has no order, and would make that of all others depend on where it stands.
        known = [each for each in candidates if not math.isnan(self.of(each))]
        return sorted(known, key=lambda each: (sign * self.of(each), each.step))

    def of(self, candidate: Measured) -> float:
        """Return the metric of `candidate`, NaN when it has none."""
        return candidate.metrics.get(self.metric, math.nan)


def best_among(candidates: Iterable[MeasuredT], criterion: Criterion, *, where: str) -> MeasuredT:
    """Return the best of the checkpoints of the run at `where`.

    Raises:
        NotFound: none of them has the metric.
    """
    listed = list(candidates)
    ranked = criterion.ranked(listed)
    if not ranked:
        said = without_metric(criterion.metric, listed, where=where)
        raise NotFound(said, kind=ErrorKind.NO_CHECKPOINT)
    return ranked[0]


def best_step(records: Sequence[Measured], criteria: Sequence[Criterion], *, where: str) -> int:
    """Return the step of the best checkpoint by the first of `criteria`.

    Raises:
        UsageError: there is no criterion.
        NotFound: no checkpoint has its metric.
    """
    if not criteria:
        raise UsageError(
            "which checkpoint is the best? Say by which metric: put an EarlyStopping into the "
            "state, or give when=policy.better(...) or keep=keep.best(...)"
        )
    return best_among(records, criteria[0], where=where).step


def without_metric(metric: str, measured: Iterable[Measured], *, where: str) -> str:
    """Return how it is said that no checkpoint of the run at `where` has a number for `metric`."""
    known = sorted({name for each in measured for name in each.metrics})
    if metric in known:
        return f"the metric {metric!r} is not a number in any checkpoint in {where}"
    more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
    there = ", ".join(map(repr, known[:_MOST_NAMED])) or "none"
    return (
        f"no checkpoint in {where} has the metric {metric!r}{near(metric, known)}; there is "
        f"{there}{more}"
    )
