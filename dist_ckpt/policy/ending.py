"""Policies for the end that comes from outside: a signal, or the notice of a cloud."""

from __future__ import annotations

import signal as signals
from abc import ABC, abstractmethod
from dataclasses import dataclass
from os import PathLike, fspath
from typing import ClassVar, TypedDict

from dist_ckpt.errors import UsageError, without_secrets
from dist_ckpt.format.names import as_integer, checked_seconds
from dist_ckpt.policy.moment import Composable, Moment, SavePolicy, Scope

NOTICE = "notice"
"""What a notice is called where a signal has its name."""

# As a shell tells that a process was ended by SIGTERM.
_TERMINATED = 128 + signals.SIGTERM
# An exit status is one byte.
_MOST_STATUS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class OnEnding(Composable, ABC):
    """What says that the job is about to be ended, and how much time it has until then."""

    grace_seconds: float | None = None
    exit_code: int | None = None
    # It may arrive at any rank: rank 0 hears of it, and names one step for all.
    scope: ClassVar[Scope] = Scope.AHEAD

    @abstractmethod
    def heeds(self, name: str) -> bool:
        """Whether this policy is about what is called `name` in `Moment.signal`."""

    def status(self, name: str) -> int:
        """Return the exit status that tells the scheduler of it."""
        return _TERMINATED if self.exit_code is None else self.exit_code

    def due(self, moment: Moment) -> str | None:
        """Return the name of what arrived, if it is heeded and there is time for a save."""
        # What arrived may be for another policy alone.
        if not self.heeds(moment.signal) or self.lacks_time(moment):
            return None
        return moment.signal if moment.signal == NOTICE else f"signal {moment.signal}"

    def left_seconds(self, moment: Moment) -> float | None:
        """Return how much of the time there will be when the save can begin; None for no limit."""
        return None if self.grace_seconds is None else self.grace_seconds - moment.waited_seconds

    def lacks_time(self, moment: Moment) -> str:
        """Return why a save is not begun, "" where it is."""
        left = self.left_seconds(moment)
        # Where none was measured it is tried: nothing says that it would not fit.
        if left is None or left > (moment.save_seconds or 0.0):
            return ""
        takes = "" if moment.save_seconds is None else f", a save takes {moment.save_seconds:.1f} s"
        instead = (
            ""
            if moment.in_flight is None
            else f", and the save of step {moment.in_flight} is waited for instead"
        )
        return (
            f"{max(left, 0.0):.1f} of {self.grace_seconds:g} s of grace are left{takes}: none is "
            f"begun at step {moment.step}{instead}"
        )

    def _arguments(self) -> list[str]:
        said = {"grace_seconds": self.grace_seconds, "exit_code": self.exit_code}
        return [f"{name}={value:g}" for name, value in said.items() if value is not None]


@dataclass(frozen=True, slots=True)
class OnSignal(OnEnding):
    """Made by `on_signal`; whoever asks the policy listens for these signals."""

    signals: tuple[signals.Signals, ...]

    def __str__(self) -> str:
        said = [*(each.name for each in self.signals), *self._arguments()]
        return f"policy.on_signal({', '.join(said)})"

    def heeds(self, name: str) -> bool:
        """Whether it is one of these signals."""
        return name in {each.name for each in self.signals}

    def status(self, name: str) -> int:
        """Return 128 and the number of the signal, as a shell does, unless another was given."""
        return 128 + signals.Signals[name] if self.exit_code is None else self.exit_code


@dataclass(frozen=True, slots=True)
class OnNotice(OnEnding):
    """Made by `on_notice`; whoever asks the policy looks there meanwhile."""

    place: str
    every_seconds: float

    def __str__(self) -> str:
        # Policies stand in messages, and a URL may have a token in it.
        said = [repr(without_secrets(self.place)), f"every={self.every_seconds:g}"]
        return f"policy.on_notice({', '.join([*said, *self._arguments()])})"

    __repr__ = __str__

    def heeds(self, name: str) -> bool:
        """Whether it is a notice."""
        return name == NOTICE


def on_signal(
    *wanted: int, grace_seconds: float | None = None, exit_code: int | None = None
) -> SavePolicy:
    """Save at the next step when one of these signals arrived at any rank.

    `Checkpointer` listens for them: its handler only takes a note, and calls the handler that was
    there before. `Checkpointer.signaled` then tells the loop to end.

    Args:
        wanted: such as `signal.SIGTERM`; none stands for SIGTERM.
        grace_seconds: how long after the signal the job is ended by force. The save gets what is
            left of it. One that would take longer, as far as the last one tells, is not begun; if
            one is in flight then, it is that one which is waited for. None: no limit is known.
        exit_code: `Checkpointer.exit_code` from then on; None: 128 and the number of the signal.

    Raises:
        UsageError: not a signal that can be caught, or a number that is none of its argument's.
    """
    try:
        # What is no integer is no signal: `True` would be SIGHUP.
        numbers = [each if as_integer(each) is None else int(each) for each in wanted]
        if any(type(each) is not int for each in numbers):
            raise ValueError(f"not {numbers!r}")
        chosen = tuple(map(signals.Signals, numbers or [signals.SIGTERM]))
    except ValueError as error:
        raise UsageError(f"policy.on_signal takes signals such as SIGTERM: {error}") from error
    if {signals.SIGKILL, signals.SIGSTOP} & set(chosen):
        raise UsageError("policy.on_signal: nobody can catch SIGKILL or SIGSTOP")
    return OnSignal(chosen, **_ending(grace_seconds, exit_code))


def on_notice(
    place: str | PathLike[str],
    *,
    every: float = 5.0,
    grace_seconds: float | None = None,
    exit_code: int | None = None,
) -> SavePolicy:
    """Save at the next step when a notice is there that this machine will be taken away.

    One rank of each host looks for it in the background, from the first step on. What it finds all
    ranks heed at the same step, as a signal, and `Checkpointer.signaled` is "notice" then.

    Args:
        place: a file that appears; or a URL of a cloud's metadata, `http://` or `https://`, that
            answers with anything but "not found", nothing, FALSE, or a list of events without one
            that ends this machine. Headers and tokens that AWS, Google and Azure want are sent.
        every: how many seconds to wait between two looks.
        grace_seconds: see `on_signal`; counted from the look that found it.
        exit_code: `Checkpointer.exit_code` from then on; None: 143, as for SIGTERM.

    Raises:
        UsageError: an argument is malformed.
    """
    where = fspath(place) if isinstance(place, str | PathLike) else ""
    # Another scheme would be taken for a path, at which nothing ever appears.
    if not where or ("://" in where and not where.startswith(("http://", "https://"))):
        raise UsageError(f"policy.on_notice takes a path, or a URL of HTTP, not {place!r}")
    return OnNotice(where, checked_seconds(every, "every"), **_ending(grace_seconds, exit_code))


class _Ending(TypedDict):
    grace_seconds: float | None
    exit_code: int | None


def _ending(grace_seconds: object, exit_code: object) -> _Ending:
    code = None if exit_code is None else as_integer(exit_code)
    if exit_code is not None and (code is None or not 0 <= code <= _MOST_STATUS):
        raise UsageError(
            f"exit_code must be an integer from 0 to {_MOST_STATUS}, not {exit_code!r}"
        )
    grace = None if grace_seconds is None else checked_seconds(grace_seconds, "grace_seconds")
    return {"grace_seconds": grace, "exit_code": code}
