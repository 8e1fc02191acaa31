"""When to save: pure values that compose by `|`.

```python
import signal

from dist_ckpt import policy

when = policy.every(500) | policy.every(seconds=900) | policy.on_signal(signal.SIGTERM)
```

Some are decided by each rank for itself, because all ranks know the same: the step, the epoch. The
others need the word of rank 0, whose clock, metrics and signals count for all; what that costs is
said at `Scope`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import as_integer, checked_seconds
from dist_ckpt.policy.ending import on_notice, on_signal
from dist_ckpt.policy.moment import (
    AnyOf,
    Composable,
    Moment,
    SavePolicy,
    Scope,
    members,
)
from dist_ckpt.repository.ranking import Criterion, Mode

__all__ = [
    "Better",
    "Counted",
    "Moment",
    "SavePolicy",
    "Scope",
    "at",
    "better",
    "checked_when",
    "counted",
    "every",
    "last",
    "members",
    "never",
    "on_notice",
    "on_signal",
    "passed_over",
]


Counted: TypeAlias = Literal["steps", "epochs"]
"""What a policy has numbers of."""


class _Counting(Composable, ABC):
    """Base of what is due at numbers of its own: a loop may tell none of them."""

    __slots__ = ()
    counts: ClassVar[Counted] = "steps"

    @abstractmethod
    def jumped(self, previous: int, now: int) -> bool:
        """Whether this is due between two numbers, the one told after the other, and not now."""


@dataclass(frozen=True, slots=True)
class _EverySteps(_Counting):
    steps: int

    def __str__(self) -> str:
        return f"policy.every({self.steps})"

    def due(self, moment: Moment) -> str | None:
        # An epoch's end is no step of its own: that step was asked about before.
        due = moment.epoch is None and moment.step % self.steps == 0
        return f"every {self.steps} steps" if due else None

    def jumped(self, previous: int, now: int) -> bool:
        return _jumps_multiple(self.steps, previous, now)


@dataclass(frozen=True, slots=True)
class _EveryEpochs(_Counting):
    epochs: int
    counts: ClassVar[Counted] = "epochs"

    def __str__(self) -> str:
        return f"policy.every(epochs={self.epochs})"

    def due(self, moment: Moment) -> str | None:
        # Where no epoch ends there is nothing to count.
        due = moment.epoch is not None and moment.epoch % self.epochs == 0
        return f"end of epoch {moment.epoch}" if due else None

    def jumped(self, previous: int, now: int) -> bool:
        return _jumps_multiple(self.epochs, previous, now)


@dataclass(frozen=True, slots=True)
class _EverySeconds(Composable):
    seconds: float
    # Clocks of ranks differ: that of rank 0 counts for all.
    scope: ClassVar[Scope] = Scope.AHEAD

    def __str__(self) -> str:
        return f"policy.every(seconds={self.seconds:g})"

    def due(self, moment: Moment) -> str | None:
        return f"every {self.seconds:g} s" if moment.seconds >= self.seconds else None


@dataclass(frozen=True, slots=True)
class _At(_Counting):
    steps: frozenset[int]
    reason: str

    def __str__(self) -> str:
        return (
            # The first word of the reason is the name of what made it.
            f"policy.{self.reason.split(maxsplit=1)[0]}({', '.join(map(str, sorted(self.steps)))})"
        )

    def due(self, moment: Moment) -> str | None:
        return self.reason if moment.step in self.steps else None

    def jumped(self, previous: int, now: int) -> bool:
        return now not in self.steps and any(previous < step < now for step in self.steps)


@dataclass(frozen=True, slots=True)
class Better(Composable):
    """Made by `better`; the criterion is read by whoever looks for the best checkpoint."""

    criterion: Criterion
    # Of the metrics of this very step nothing can be said ahead.
    scope: ClassVar[Scope] = Scope.AT_ONCE

    def __str__(self) -> str:
        return f"policy.better({self.criterion.metric!r}, mode={self.criterion.mode!r})"

    def due(self, moment: Moment) -> str | None:
        """Return how the metric got better, if it did."""
        # A metric that is missing is as NaN, which beats nothing.
        value = moment.metrics.get(self.criterion.metric, math.nan)
        best = moment.best.get(self.criterion)
        if not self.criterion.beats(value, best):
            return None
        before = "the first" if best is None else f"before {best:g}"
        return f"better {self.criterion.metric}: {value:g}, {before}"


def every(
    steps: int | None = None, *, seconds: float | None = None, epochs: int | None = None
) -> SavePolicy:
    """Save at every multiple of `steps`, every `seconds`, or at the end of every `epochs` epochs.

    Args:
        steps: how many training steps apart.
        seconds: how long after the last save began, by the clock of rank 0.
        epochs: how many epochs apart; ends are told by `Checkpointer.epoch_end`.

    Raises:
        UsageError: not exactly one of the three, or not a positive number.
    """
    if [steps, seconds, epochs].count(None) != 2:
        raise UsageError(
            "policy.every takes one of: every(500), every(seconds=900), every(epochs=1)"
        )
    if steps is not None:
        return _EverySteps(_positive(steps, "steps"))
    if epochs is not None:
        return _EveryEpochs(_positive(epochs, "epochs"))
    return _EverySeconds(checked_seconds(seconds, "seconds"))


def at(*steps: int) -> SavePolicy:
    """Save after these steps.

    Raises:
        UsageError: none, or one that is no integer from 0.
    """
    return _At(_steps(steps), "at given steps")


def last(step: int) -> SavePolicy:
    """Save after `step`, the last of the training.

    Raises:
        UsageError: no integer from 0.
    """
    return _At(_steps((step,)), "last step")


def better(metric: str, *, mode: Mode = "min") -> SavePolicy:
    """Save when `metric` is better than in every checkpoint of the run so far.

    The value that rank 0 gives counts for all. Where the metric is missing or NaN nothing is due.

    Args:
        metric: its name in the metrics given to `Checkpointer.step` or `epoch_end`.
        mode: "min" when smaller is better, "max" when larger is.

    Raises:
        UsageError: an argument is malformed.
    """
    return Better(Criterion(metric, mode))


def never() -> SavePolicy:
    """Save only when `Checkpointer.save` is called."""
    # Of nothing: with any other policy `|` gives that one.
    return AnyOf(())


def checked_when(policy: object) -> SavePolicy:
    """Return `policy` if it is one, `never()` for None: what `when=` of a call was given.

    Raises:
        UsageError: it is something else, such as a number or a function that was not called.
    """
    if policy is None:
        return never()
    found: tuple[Any, ...] = members(policy)  # type: ignore[arg-type]  # all else is its own
    for each in found:
        is_one = callable(getattr(each, "due", None)) and hasattr(each, "scope")
        # A class has both attributes, too; what it makes is meant.
        if isinstance(each, type) or not is_one:
            # A bare number is most often meant as steps.
            hint = f"policy.every({each})" if as_integer(each) else "policy.every(500)"
            called = ", which was not called" if callable(each) else ""
            raise UsageError(
                f"when= takes a policy of dist_ckpt.policy such as {hint}, not {each!r}{called}"
            )
    return policy  # type: ignore[return-value]  # each member was looked at


def counted(policy: SavePolicy) -> set[str]:
    """Return what `every` of `policy` counts: "steps", "epochs", both or neither."""
    kinds = {"steps": _EverySteps, "epochs": _EveryEpochs}
    found = members(policy)
    return {name for name, kind in kinds.items() if any(isinstance(each, kind) for each in found)}


def passed_over(policy: SavePolicy, *, previous: int, now: int, of: Counted) -> SavePolicy | None:
    """Return the member of `policy` that was due between two numbers told, and at neither.

    Args:
        policy: what was asked at both.
        previous: the number told before.
        now: the one told now.
        of: what they are numbers of.
    """
    for each in members(policy):
        if isinstance(each, _Counting) and each.counts == of and each.jumped(previous, now):
            return each
    return None


def _jumps_multiple(apart: int, previous: int, now: int) -> bool:
    # A multiple lies behind `previous`: unless that is `now` nobody asked about it.
    return now // apart > previous // apart and now % apart != 0


def _steps(steps: tuple[int, ...]) -> frozenset[int]:
    for step in steps:
        number = as_integer(step)
        if number is None or number < 0:
            raise UsageError(f"a step is an integer from 0, not {step!r}")
    if not steps:
        raise UsageError("policy.at takes at least one step")
    return frozenset(map(int, steps))


def _positive(count: object, what: str) -> int:
    number = as_integer(count)
    if number is None or number < 1:
        raise UsageError(f"{what} must be a positive integer, not {count!r}")
    return number
