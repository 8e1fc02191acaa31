"""A save in flight, as its caller sees it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dist_ckpt.errors import CheckpointError, ErrorKind, UsageError
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.saving import untold
from dist_ckpt.storage.base import Watch
from dist_ckpt.waiting import Latch

# How far a save is: read from any thread, and told as events.


SavePhase = Literal["staging", "writing", "committing", "done"]
"""What a rank does for a save: copy, then digest and write, then wait for the others, then none."""

_TOLD = 16
"""How often a rank tells how many bytes it has written, besides the changes of phase."""


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


_LOOK_SECONDS = 0.05

SaveOutcome = Literal["committed", "failed", "cancelled", "skipped"]
"""How a save ended; only the first of these leaves a checkpoint."""


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
        self._number = untold.number()
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
        untold.drop(self._number)
        return error

    def tell_at_exit(self, text: str) -> None:
        """Have the end of the process say `text`, unless somebody is told of the failure first."""
        with self._lock:
            if not self._told:
                untold.keep(self._number, text)

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
