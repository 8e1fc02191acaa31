"""What to keep: pure values that name the checkpoints worth keeping, each with its reason.

They compose by `|`, and this keeps what any of the three keeps:

```python
from dist_ckpt import keep

wanted = keep.latest(3) | keep.best("val/loss", 2) | keep.every(10_000)
```

Whatever a policy says, the newest checkpoint stays, and so do pinned ones and the one that the run
went on from (commit-v1, section 6).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import as_integer, as_number
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.joined import JoinedByOr
from dist_ckpt.repository.ranking import Criterion, Mode, without_metric

PRESETS = ("best", "last", "periodic", "best_and_last", "best_and_periodic")
"""The names that `preset` knows."""


class KeepPolicy(Protocol):
    """Decides by what the manifests say alone: no files, no clock."""

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        """Return, by step, the reason to keep for each of `records` that this policy wants.

        Args:
            records: the checkpoints that are there and not known to be damaged, by step ascending.
        """
        ...


class Keep(JoinedByOr, ABC):
    """A policy that composes by `|`, with any other; what the functions here return."""

    __slots__ = ()

    @abstractmethod
    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        """Return the reason to keep for each of `records`; see `KeepPolicy.kept`."""

    def __or__(self, other: KeepPolicy) -> Keep:
        return either(self, other)

    def __ror__(self, other: KeepPolicy) -> Keep:
        return either(other, self)


@dataclass(frozen=True, slots=True)
class _AnyOf(Keep):
    members: tuple[KeepPolicy, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.members))

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        reasons: dict[int, list[str]] = {}
        for member in self.members:
            for step, reason in member.kept(records).items():
                reasons.setdefault(step, []).append(reason)
        # Two members may have one reason, which is told once.
        return {step: ", ".join(dict.fromkeys(each)) for step, each in reasons.items()}


@dataclass(frozen=True, slots=True)
class _All(Keep):
    def __str__(self) -> str:
        return "keep.all()"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        return {record.step: "all are kept" for record in records}


@dataclass(frozen=True, slots=True)
class _Latest(Keep):
    count: int

    def __str__(self) -> str:
        return f"keep.latest({self.count})"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        newest_first = sorted((record.step for record in records), reverse=True)
        return {
            step: f"latest #{place}" for place, step in enumerate(newest_first[: self.count], 1)
        }


@dataclass(frozen=True, slots=True)
class _Best(Keep):
    criterion: Criterion
    count: int

    def __str__(self) -> str:
        mode = "" if self.criterion.mode == "min" else f", mode={self.criterion.mode!r}"
        return f"keep.best({self.criterion.metric!r}, {self.count}{mode})"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        best_first = self.criterion.ranked(records)[: self.count]
        return {
            record.step: f"best {self.criterion.metric} #{place}"
            for place, record in enumerate(best_first, 1)
        }


@dataclass(frozen=True, slots=True)
class _EverySteps(Keep):
    steps: int

    def __str__(self) -> str:
        return f"keep.every({self.steps})"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        # The last of each stretch: where saves do not fall on multiples, what comes closest before.
        last = {-(-record.step // self.steps): record.step for record in records}
        return dict.fromkeys(last.values(), f"every {self.steps} steps")


@dataclass(frozen=True, slots=True)
class _EveryEpochs(Keep):
    epochs: int

    def __str__(self) -> str:
        return f"keep.every(epochs={self.epochs})"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        last = {
            -(-record.epoch // self.epochs): record.step
            for record in records
            if record.epoch is not None
        }
        return dict.fromkeys(last.values(), f"every {self.epochs} epochs")


@dataclass(frozen=True, slots=True)
class _NewerThan(Keep):
    seconds: float

    def __str__(self) -> str:
        return f"keep.newer_than({self.seconds:g})"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        if not records:
            return {}
        # By the step, as clocks of hosts differ.
        newest = max(records, key=lambda record: record.step)
        return {
            record.step: f"newer than {timedelta(seconds=self.seconds)}"
            for record in records
            if _age_seconds(record, newest) < self.seconds
        }


def latest(count: int) -> Keep:
    """Keep the newest `count` checkpoints.

    Raises:
        UsageError: `count` is not a positive integer.
    """
    return _Latest(_positive(count, "keep.latest takes a positive number of checkpoints"))


def best(metric: str, count: int = 1, *, mode: Mode = "min") -> Keep:
    """Keep the `count` checkpoints with the best `metric`.

    A checkpoint without the metric, or where it is NaN, is none of them. Of equal ones the older
    is the better.

    Args:
        metric: its name in the `metrics` that were given to the save.
        count: how many.
        mode: "min" when smaller is better, "max" when larger is.

    Raises:
        UsageError: an argument is malformed.
    """
    count = _positive(count, "keep.best takes a positive number of checkpoints")
    return _Best(Criterion(metric, mode), count)


def every(steps: int | None = None, *, epochs: int | None = None) -> Keep:
    """Keep one checkpoint of each stretch of `steps` steps, or of `epochs` epochs.

    That is the last of the stretch: `every(10_000)` keeps those of steps 10,000, 20,000 and so on,
    and where none was saved at such a step the one before it. Of epochs only the checkpoints
    count that were saved at the end of one.

    Raises:
        UsageError: not exactly one of the two, or not a positive integer.
    """
    if (steps is None) == (epochs is None):
        raise UsageError("keep.every takes steps or epochs: every(10_000) or every(epochs=5)")
    if epochs is not None:
        return _EveryEpochs(_positive(epochs, "keep.every takes a positive number of epochs"))
    return _EverySteps(_positive(steps, "keep.every takes a positive number of steps"))


def newer_than(age: timedelta | float) -> Keep:
    """Keep what was saved less than `age` before the newest checkpoint.

    Ages are differences between times that were stored, never between a stored one and the clock
    of this host: a run that pauses for a week loses nothing. A checkpoint is old only when both
    the wall clock and the training time that were stored say so, so a host whose clock is hours
    ahead makes none old.

    Args:
        age: a `timedelta`, or seconds.

    Raises:
        UsageError: not a positive, finite span of time.
    """
    seconds = age.total_seconds() if isinstance(age, timedelta) else as_number(age)
    if seconds is None:
        raise UsageError(f"keep.newer_than takes a timedelta or seconds, not {age!r}")
    if not 0 < seconds <= timedelta.max.total_seconds():  # refuses NaN too
        raise UsageError(f"keep.newer_than takes a positive span of time, not {age!r}")
    return _NewerThan(seconds)


def all() -> Keep:  # noqa: A001 - keep.all() is how it reads
    """Keep every checkpoint."""
    return _All()


def preset(
    name: str, *, metric: str | None = None, mode: Mode = "min", steps: int | None = None
) -> Keep:
    """Return a policy by name, as a configuration file gives it.

    Args:
        name: `best` (the best one), `last` (the newest one), `periodic` (one of every `steps`),
            `best_and_last`, `best_and_periodic`.
        metric: for the names with `best`: by which metric.
        mode: "min" when smaller is better, "max" when larger is.
        steps: for the names with `periodic`: how many steps apart.

    Raises:
        UsageError: an unknown name, an argument that it needs is missing, or one it does not take.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r} of what to keep: one of {', '.join(PRESETS)}")
    words = name.split("_and_")
    for word, argument, value in (("best", "metric", metric), ("periodic", "steps", steps)):
        if (word in words) != (value is not None):
            verb = "needs" if word in words else "takes no"
            raise UsageError(f"the preset {name!r} of what to keep {verb} {argument}=")
    policies = {
        "best": lambda: best(metric or "", mode=mode),
        "last": lambda: latest(1),
        "periodic": lambda: every(steps),
    }
    chosen = [policies[word]() for word in words]
    return chosen[0] if len(chosen) == 1 else _AnyOf(tuple(chosen))


def either(one: KeepPolicy, other: KeepPolicy) -> Keep:
    """Return the policy that keeps what either keeps, as `|` does, whatever made them."""
    return _AnyOf((*_members(one), *_members(other)))


def checked_keep(policy: object) -> KeepPolicy | None:
    """Return `policy` if it is one, or None: what `keep=` of a call was given.

    Raises:
        UsageError: it is something else, such as a number or a function that was not called.
    """
    members = _members(policy)  # type: ignore[arg-type]  # anything else has itself as its member
    for each in () if policy is None else members:
        # A class has the method too, and is no policy: it was not called.
        if isinstance(each, type) or not callable(getattr(each, "kept", None)):
            hint = f"keep.latest({each})" if as_integer(each) else "keep.latest(3)"
            called = ", which was not called" if callable(each) else ""
            raise UsageError(
                f"keep= takes a policy of dist_ckpt.keep such as {hint}, not {each!r}{called}"
            )
    return policy  # type: ignore[return-value]  # each member was looked at


def criteria(policy: KeepPolicy) -> tuple[Criterion, ...]:
    """Return by which metrics `policy` looks for the best, in order, none twice."""
    found = (each.criterion for each in _members(policy) if isinstance(each, _Best))
    return tuple(dict.fromkeys(found))


def check_metrics(policy: KeepPolicy, records: Sequence[Record], *, where: str) -> None:
    """Check that a checkpoint has each metric by which `policy` keeps the best, and an epoch.

    Asked by people, who mistype: what nobody has keeps nothing.

    Raises:
        UsageError: none of `records`, those of the run at `where`, has one of them, or is of the
            end of an epoch where some are kept by epochs.
    """
    for criterion in criteria(policy):
        if not criterion.ranked(records):
            said = without_metric(criterion.metric, records, where=where)
            raise UsageError(f"{said}. So {policy} would keep none by it")
    by_epochs = any(isinstance(each, _EveryEpochs) for each in _members(policy))
    if by_epochs and not [record for record in records if record.epoch is not None]:
        raise UsageError(
            f"no checkpoint in {where} was saved at the end of an epoch. So {policy} would keep "
            "none by epochs"
        )


def _members(policy: KeepPolicy) -> tuple[KeepPolicy, ...]:
    return policy.members if isinstance(policy, _AnyOf) else (policy,)


def _age_seconds(record: Record, newest: Record) -> float:
    """Return how much older `record` is than `newest`, by the clock that says the least."""
    by_clock = (newest.created - record.created).total_seconds()
    if record.elapsed_seconds is None or newest.elapsed_seconds is None:
        return by_clock
    # Wall clocks jump from host to host; training time does not, but is not counted while a run
    # stands still. What is deleted must be old by both.
    return min(by_clock, newest.elapsed_seconds - record.elapsed_seconds)


def _positive(count: object, what: str) -> int:
    number = as_integer(count)
    if number is None or number < 1:
        raise UsageError(f"{what}, not {count!r}")
    return number
