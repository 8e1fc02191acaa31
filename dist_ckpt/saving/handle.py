"""A save in flight, as others see it and may end it, and what becomes of those that fail."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dist_ckpt import events
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    StorageError,
    UsageError,
    describe,
    may_pass,
)
from dist_ckpt.format.names import as_integer
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic
from dist_ckpt.storage.base import Watch
from dist_ckpt.threads import Latch

SaveOutcome = Literal["committed", "failed", "cancelled", "skipped"]
"""How a save ended; only the first of these leaves a checkpoint."""

SavePhase = Literal["staging", "writing", "committing", "done"]
"""What a rank does for a save: copy, then digest and write, then wait for the others, then none."""

_LOOK_SECONDS = 0.05

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far this rank is with its share of a save.

    Attributes:
        phase: what it is doing.
        nbytes_done: how many bytes it has handed to storage; it never falls.
        nbytes_total: how many there are, known once they are staged; equal to `nbytes_done` once
            all of them are stored.
    """

    phase: SavePhase
    nbytes_done: int
    nbytes_total: int


@dataclass(frozen=True, slots=True)
class SaveHooks:
    """How a handle reaches the save that it stands for.

    Attributes:
        overdue: asked from time to time when the deadline is near; returns the error to end the
            save with, although the writer has not come back.
        announce: told the outcome, once, before anybody who waits goes on.
        cancel: asks every rank to give the save up.
        progress: says how far this rank is.
    """

    overdue: Callable[[], CheckpointError | None]
    announce: Callable[[Exception | None], None]
    cancel: Callable[[], None]
    progress: Callable[[], SaveProgress]


class SaveHandle:
    """The outcome of one save, known once every rank has reported and rank 0 has decided.

    It may be used from any thread.

    Attributes:
        step: what is being saved.
        save_id: the attempt, as it appears in keys and in the manifest; empty for a save that was
            skipped.
    """

    def __init__(self, step: int, save_id: str, deadline: Deadline, hooks: SaveHooks) -> None:
        """Made by the engine.

        Args:
            step: what is being saved.
            save_id: the attempt.
            deadline: when the save is over in any case.
            hooks: the way to the save; not kept longer than that is in flight.
        """
        self.step = step
        self.save_id = save_id
        self._deadline = deadline
        self._hooks = hooks
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._outcome: SaveOutcome | None = None
        self._over = Latch()
        self._error: Exception | None = None
        self._told = False
        self._number = untold_number()
        self._pid = os.getpid()

    @classmethod
    def skipped(cls, step: int) -> SaveHandle:
        """Return the handle of a save that is not made, because another is in flight."""
        return cls._ended(step, "", "skipped")

    @classmethod
    def committed(cls, step: int, save_id: str) -> SaveHandle:
        """Return the handle of a checkpoint that was there before."""
        return cls._ended(step, save_id, "committed")

    @classmethod
    def not_begun(cls, step: int, error: Exception) -> SaveHandle:
        """Return the handle of a save that could not begin, which was told already."""
        handle = cls(step, "", Deadline.after(0), _NO_HOOKS)
        handle.finish(error)
        handle.take_error()
        return handle

    @classmethod
    def _ended(cls, step: int, save_id: str, outcome: SaveOutcome) -> SaveHandle:
        handle = cls(step, save_id, Deadline.after(0), _NO_HOOKS)
        handle._outcome = outcome
        handle._over.open()
        return handle

    def done(self) -> bool:
        """Whether the save is over, well or badly."""
        return self._over.is_open

    @property
    def outcome(self) -> SaveOutcome | None:
        """How the save ended, None while it is in flight. The same on every rank."""
        return self._outcome if self._over.is_open else None

    @property
    def progress(self) -> SaveProgress:
        """How far this rank is with its share; bytes never become fewer."""
        return self._hooks.progress()

    def cancel(self) -> bool:
        """Ask that the save be given up, on every rank; one rank that asks is enough.

        No rank writes more than the pieces under way then (8 MiB of a file, or one part of an
        upload), and nothing of the save is listed. It may be too late: once `wait` returns or
        raises, `outcome` tells whether the save was cancelled or committed.

        Returns:
            False if the save was over already: nothing was changed.

        Raises:
            UsageError: as for `wait`.
        """
        self._check_process()
        with self._lock:
            if self._outcome is not None:
                return False
            cancel = self._hooks.cancel
        cancel()
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save is over; return whether it is.

        Args:
            timeout: how many seconds to wait, None for as long as it takes. A save is over at its
                own deadline at the latest.

        Raises:
            CheckpointError: the save failed, or was cancelled (then its kind is
                `ErrorKind.CANCELLED`). The same on every rank.
            UsageError: the save is in flight in the process of which this one was forked, and its
                end will never be known here.
            Exception: on the rank where something foreign failed that itself, a MemoryError for
                example; the other ranks have a `CoordinationError` then.
        """
        self._check_process()
        over = self.settle(timeout)
        if over:
            self.take_error()  # from now on the caller knows
            if self._error is not None:
                raise self._error
        return over

    def settle(self, timeout: float | None = None) -> bool:
        """Wait like `wait`, but leave a failure to be asked for by `take_error`."""
        until = None if timeout is None else time.monotonic() + timeout
        near = self._deadline.for_coordinator()
        while not self._over.is_open:
            nap = _LOOK_SECONDS if near.passed else near.remaining_seconds + _LOOK_SECONDS
            if until is not None:
                nap = min(nap, until - time.monotonic())
            if nap <= 0 or self._over.wait(nap):
                break
            if near.passed:
                self._look()
        return self._over.is_open

    def _check_process(self) -> None:
        # A child has a copy of this, and not the thread that would ever change it.
        if self._pid != os.getpid() and not self._over.is_open:
            raise UsageError(
                f"the save of step {self.step} is in flight in process {self._pid}, of which this "
                "one was forked: wait for it there"
            )

    def _look(self) -> None:
        # One at a time: giving a save up twice would give up the next one's thread with it.
        with self._looking:
            error = None if self._outcome else self._hooks.overdue()
            if error is None or not self._decide(error):
                return
        self._end()

    @property
    def cancelled(self) -> bool:
        """Whether the save ends, or has ended, because somebody gave it up."""
        return self._outcome == "cancelled"

    @property
    def error(self) -> Exception | None:
        """What the save failed with; who asks here does not count as told."""
        return self._error if self._over.is_open else None

    @property
    def failed(self) -> bool:
        """Whether the save is over without a checkpoint."""
        return self._error is not None

    def take_error(self) -> Exception | None:
        """Return the failure the first time it is asked for: it is to be told once.

        A save that was cancelled has none: somebody wanted it so.
        """
        with self._lock:
            error = self._error if self._outcome == "failed" and not self._told else None
            self._told = True
        drop_untold(self._number)
        return error

    def tell_at_exit(self, text: str) -> None:
        """Have the end of the process say `text`, unless somebody is told of the failure first."""
        with self._lock:
            if not self._told:
                note_untold(self._number, text)

    def finish(self, error: Exception | None) -> bool:
        """End the save; return whether this call did it, since the first outcome stands."""
        if not self._decide(error):
            return False
        self._end()
        return True

    def _decide(self, error: Exception | None) -> bool:
        with self._lock:
            if self._outcome is not None:
                return False
            self._outcome, self._error = _outcome_of(error), error
        return True

    def _end(self) -> None:
        try:
            self._hooks.announce(self._error)
        finally:
            # A handle may be kept for long; the model and the arena behind these may not.
            last = replace(self._hooks.progress(), phase="done")
            self._hooks = replace(_NO_HOOKS, progress=lambda: last)
            self._over.open()


def _outcome_of(error: Exception | None) -> SaveOutcome:
    if error is None:
        return "committed"
    cancelled = isinstance(error, CheckpointError) and error.kind is ErrorKind.CANCELLED
    return "cancelled" if cancelled else "failed"


_NOTHING = SaveProgress("done", 0, 0)
_NO_HOOKS = SaveHooks(
    overdue=lambda: None,
    announce=lambda error: None,
    cancel=lambda: None,
    progress=lambda: _NOTHING,
)


# How far a save is: read from any thread, and told as events.


_TOLD = 16
"""How often a rank tells how many bytes it has written, besides the changes of phase."""


class ProgressMeter:
    """Counts what one rank does for one save.

    Args:
        tell: told at every change of phase, and about 16 times while bytes are written.
    """

    def __init__(self, tell: Callable[[SaveProgress], None]) -> None:
        self._now = SaveProgress("staging", 0, 0)
        self._tell = tell
        self._lock = threading.Lock()
        self._told_phase: SavePhase | None = None
        self._next_told = 0

    @property
    def now(self) -> SaveProgress:
        """How far it is."""
        return self._now  # replaced whole, so it is read without the lock

    def staged(self, nbytes_total: int) -> None:
        """Note how many bytes this rank writes in all, which is known once they are staged."""
        with self._lock:
            self._now = replace(self._now, nbytes_total=nbytes_total)
            self._next_told = self._now.nbytes_done + max(nbytes_total // _TOLD, 1)

    def enter(self, phase: SavePhase) -> None:
        """Note that `phase` has begun, or is going on."""
        with self._lock:
            if phase != self._told_phase:
                self._told_phase = phase
                self._now = replace(self._now, phase=phase)
                self._tell(self._now)

    def file(self, nbytes: int) -> Watch:
        """Return the watch for the put of one file of `nbytes`."""
        seen = 0

        def watch(count: int) -> None:
            nonlocal seen
            with self._lock:
                # What is sent again after a failure is told again, and counted once.
                fresh = min(seen + count, nbytes) - seen
                seen += fresh
                self._advance(fresh)

        return watch

    def _advance(self, nbytes: int) -> None:
        done = self._now.nbytes_done + nbytes
        # What leaves while the rest is still to be staged belongs to a whole of unknown size.
        now = replace(self._now, nbytes_done=done, nbytes_total=max(done, self._now.nbytes_total))
        self._now = now
        if now.phase == "writing" and done >= self._next_told:
            self._next_told = done + max(now.nbytes_total // _TOLD, 1)
            # Under the lock: whoever listens hears no number after a higher one.
            self._tell(now)


# Failures of saves that nobody was told of yet: the end of the process tells them.


_numbers = itertools.count()
# Single operations on a dict, which threads cannot see half done: no lock that a fork could leave
# locked for ever. Texts and no errors: an error keeps the frames alive that it passed.
_untold: dict[int, str] = {}

# What became of its parent's saves is nothing that a child has to tell.
os.register_at_fork(after_in_child=_untold.clear)


def untold_number() -> int:
    """Return a number for a save, to be known by here."""
    return next(_numbers)


def note_untold(save: int, text: str) -> None:
    """Remember that a save failed, as `text` says, until somebody is told."""
    _untold[save] = text


def drop_untold(save: int) -> None:
    """Forget the failure: somebody was told."""
    _untold.pop(save, None)


def take_untold() -> list[str]:
    """Return what nobody was told, the oldest first, and forget it."""
    found = sorted(_untold.items())
    for save, _ in found:
        drop_untold(save)
    return [text for _, text in found]


# How the saves of one job went: how long one takes, and what becomes of those that fail.


WhenFailed = Literal["raise", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Whether training goes on when a save failed; see `TrainingOptions`.

    Raises:
        UsageError: a value is none that it can have.
    """

    when_failed: WhenFailed = "raise"
    max_failures: int = 3

    def __post_init__(self) -> None:
        """Check every value, so that a bad one is not found at the first failure."""
        if self.when_failed not in get_args(WhenFailed):
            raise UsageError(f"when_failed is 'raise' or 'warn', not {self.when_failed!r}")
        number = as_integer(self.max_failures)
        if number is None or number < 1:
            raise UsageError(f"max_failures is an integer from 1, not {self.max_failures!r}")

    def alike(self) -> dict[str, str]:
        """Return what all ranks must have been given alike, as text."""
        return {"when_failed": self.when_failed, "max_failures": str(self.max_failures)}

    def bears(self, error: BaseException) -> bool:
        """Whether `error`, of a save in the background, alone does not end the training."""
        return self.when_failed == "warn" and may_pass(error)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of a save that would begin now.

    Attributes:
        seconds: until it is over, with what is left of one in flight; None where that is unknown.
        in_flight: the step of that one, None for none.
    """

    seconds: float | None = None
    in_flight: int | None = None


class Outcomes:
    """What the saves before tell about the next one.

    Attributes:
        failure: what the save before failed with, as far as this rank knows, whether that was told
            or not; None where it did not fail.
        lost: whether it failed, as all ranks were told together.
        in_a_row: how many saves failed since the last one that was committed. It follows from what
            all ranks were told together, so it is the same on all of them.
    """

    def __init__(self, url: str, tolerance: Tolerance) -> None:
        self._url = url
        self._tolerance = tolerance
        self._took_seconds: float | None = None
        self._begun_at = 0.0
        self._was_begun = False
        self._ending = threading.Lock()
        self._ended: SaveHandle | None = None
        self.failure: Exception | None = None
        self.lost = False
        self.in_a_row = 0

    @property
    def warns(self) -> bool:
        """Whether failures are warned of, as long as they are not too many."""
        return self._tolerance.when_failed == "warn"

    def bears(self, error: BaseException | None) -> bool:
        """Whether there is an error that alone does not end the training; see `Tolerance`."""
        return error is not None and self._tolerance.bears(error)

    def begun(self) -> None:
        """Take note that a save begins now on all ranks."""
        self._begun_at = time.monotonic()
        self._was_begun = True

    def ended(self, handle: SaveHandle, *, rank: int) -> None:
        """Take note of the end of the save that was begun last; more than once does no harm."""
        # Told by the writer as soon as it is known, and by the training before it asks.
        with self._ending:
            if handle is self._ended or not handle.done():
                return
            self._ended = handle
            self.failure = failure = handle.error if handle.outcome == "failed" else None
            if handle.outcome == "committed":
                self._took_seconds = time.monotonic() - self._begun_at
        if failure is not None and self.bears(failure) and rank == 0:
            self._warn(handle.step, failure)

    def outlook(self, in_flight: SaveHandle | None) -> Outlook:
        """Return what is to be expected of a next save."""
        took = self._took_seconds
        if in_flight is None:
            return Outlook(took)
        since = time.monotonic() - self._begun_at
        # Of the first one it is known only that it takes longer than until now.
        left = since if took is None else max(took - since, 0.0)
        return Outlook(left + (took or 0.0), in_flight.step)

    def heard(self, told: CheckpointError | None) -> bool:
        """Take note of how the save before ended; return whether training goes on.

        Args:
            told: what all ranks were told that it failed with, on whichever rank it did.
        """
        self.failure = None
        self.lost = told is not None
        if told is not None:
            return self._bear(bears=self._tolerance.bears(told))
        # Of one that was not begun nothing is heard: it counts already.
        self.in_a_row = 0 if self._was_begun else self.in_a_row
        return True

    def not_begun(self, step: int, error: StorageError, *, rank: int) -> bool:
        """Take note that no rank could begin to save; return whether training goes on."""
        self._was_begun, self.lost = False, True
        goes_on = self._bear(bears=self.bears(error))
        if goes_on:
            events.emit(events.SaveFailed(self._url, step, rank, error))
            if rank == 0:
                self._warn(step, error)
        return goes_on

    def row(self) -> str:
        """Return what is to be said of several failures, after that of the last one."""
        return f", after {self.in_a_row} failures in a row" if self.in_a_row > 1 else ""

    def _bear(self, *, bears: bool) -> bool:
        self.in_a_row += 1
        return bears and self.in_a_row < self._tolerance.max_failures

    def _warn(self, step: int, error: BaseException) -> None:
        _log.warning(
            "the save of step %d to %s failed, and training goes on: the next one is made when it "
            "is due, and %d failures in a row end it: %s",
            step,
            self._url,
            self._tolerance.max_failures,
            describe(error),
        )


# Whether a save is still wanted: asked before every piece that leaves, and before the commit.


class CancelToken:
    """What ends one save before its commit: a cancel or a failure on any rank, or its deadline.

    Args:
        coordinator: the way to the other ranks; used from any thread.
        topic: of the round that the save ends with.
    """

    def __init__(self, coordinator: Coordinator, topic: Topic) -> None:
        self._coordinator = coordinator
        self._topic = topic
        self._reason: CheckpointError | None = None
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Give the save up on every rank, unless it is committed first."""
        cancelled = _cancelled(self._topic, self._coordinator.rank)
        self._end(cancelled)
        self._coordinator.refuse(self._topic, cancelled)

    def give_up(self, error: CheckpointError) -> None:
        """End what this rank still does for the save: it has been told that it failed."""
        # Of no class that a store would take for its own and try again after.
        self._end(CoordinationError(error.message, kind=error.kind, ranks=error.ranks))

    def fail(self, error: BaseException) -> None:
        """End the other puts of this rank: one of them failed with `error`."""
        rank = self._coordinator.rank
        self._end(
            CoordinationError(
                f"{self._topic.label}: another file of rank {rank} failed: {describe(error)}",
                ranks={rank: describe(error)},
            )
        )

    def check(self) -> None:
        """Raise if the save is not wanted any more; cheap enough to be asked for every piece.

        Raises:
            CoordinationError: it was cancelled, or it has failed, be it on another rank.
        """
        error = None if self._reason else self._coordinator.verdict(self._topic)
        if error is not None:
            self.give_up(error)
        if self._reason is not None:
            raise self._reason

    def confirm(self, deadline: Deadline) -> None:
        """Raise if the save may not be committed any more.

        Raises:
            CoordinationError: it was cancelled, or `deadline` has passed.
        """
        # Never after the deadline: a rank that has reported a failure must not be proved wrong.
        if deadline.passed:
            raise CoordinationError(
                f"{self._topic.label} took too long: {deadline.span_seconds:g} s are over",
                kind=ErrorKind.TIMEOUT,
                ranks={self._coordinator.rank: "took too long"},
            )
        self.check()

    def _end(self, reason: CheckpointError) -> None:
        with self._lock:
            # The first reason stands: it is the one that others are told.
            self._reason = self._reason or reason


def _cancelled(topic: Topic, rank: int) -> CheckpointError:
    return CoordinationError(
        f"{topic.label} was cancelled on rank {rank}",
        kind=ErrorKind.CANCELLED,
        ranks={rank: "cancelled it"},
    )
