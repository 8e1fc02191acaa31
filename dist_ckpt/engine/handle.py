"""A save in flight, as its caller sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dist_ckpt.engine.coordinator import Deadline
from dist_ckpt.errors import CheckpointError

_LOOK_SECONDS = 0.05


class SaveHandle:
    """The outcome of one save, known once every rank has reported and rank 0 has decided.

    Attributes:
        step: what is being saved.
        save_id: the attempt, as it appears in keys and in the manifest.
    """

    def __init__(
        self,
        step: int,
        save_id: str,
        deadline: Deadline,
        overdue: Callable[[], CheckpointError | None],
        announce: Callable[[CheckpointError | None], None],
    ) -> None:
        """Made by the engine.

        Args:
            step: what is being saved.
            save_id: the attempt.
            deadline: when the save is over in any case.
            overdue: asked from time to time when the deadline is near; returns the error to end the
                save with, although the writer has not come back.
            announce: told the outcome, once, before anybody who waits goes on.
        """
        self.step = step
        self.save_id = save_id
        self._deadline = deadline
        self._overdue = overdue
        self._announce = announce
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._decided = False
        self._over = threading.Event()
        self._error: CheckpointError | None = None
        self._told = False

    def done(self) -> bool:
        """Whether the save is over, well or badly."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save is over; return whether it is.

        Args:
            timeout: how many seconds to wait, None for as long as it takes. A save is over at its
                own deadline at the latest.

        Raises:
            CheckpointError: the save failed. The same on every rank.
        """
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
        while not self._over.is_set():
            nap = _LOOK_SECONDS if near.passed else near.remaining_seconds + _LOOK_SECONDS
            if until is not None:
                nap = min(nap, until - time.monotonic())
            if nap <= 0 or self._over.wait(nap):
                break
            if near.passed:
                self._look()
        return self._over.is_set()

    def _look(self) -> None:
        # One at a time: giving a save up twice would give up the next one's thread with it.
        with self._looking:
            error = None if self._decided else self._overdue()
            if error is None or not self._decide(error):
                return
        self._end()

    @property
    def failed(self) -> bool:
        """Whether the save is over without a checkpoint."""
        return self._error is not None

    def take_error(self) -> CheckpointError | None:
        """Return the failure the first time it is asked for: it is to be told once."""
        with self._lock:
            error = None if self._told else self._error
            self._told = True
        return error

    def finish(self, error: CheckpointError | None) -> bool:
        """End the save; return whether this call did it, since the first outcome stands."""
        if not self._decide(error):
            return False
        self._end()
        return True

    def _decide(self, error: CheckpointError | None) -> bool:
        with self._lock:
            if self._decided:
                return False
            self._decided, self._error = True, error
        return True

    def _end(self) -> None:
        try:
            self._announce(self._error)
        finally:
            self._over.set()
            # A handle may be kept for long; the model and the arena behind these may not.
            self._overdue, self._announce = _no_error, _to_nobody


def _no_error() -> None:
    return None


def _to_nobody(error: CheckpointError | None) -> None:
    pass
