"""How the saves of one job went: how long one takes, and what becomes of those that fail."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal, get_args

from dist_ckpt import events
from dist_ckpt.errors import CheckpointError, StorageError, UsageError, describe, may_pass
from dist_ckpt.format.limits import as_integer
from dist_ckpt.saving.handle import SaveHandle

WhenFailed = Literal["raise", "warn"]

_log = logging.getLogger("dist_ckpt")


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
