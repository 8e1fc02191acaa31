"""Whether a save is still wanted: asked before every piece that leaves, and before the commit."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, describe
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic

_LOOK_SECONDS = 0.25
"""How often, at most, one rank asks whether another called the save off."""


class CancelToken:
    """What ends one save before its commit: a cancel on any rank, its deadline, a failure here.

    Args:
        coordinator: the way to the other ranks; used from any thread.
        topic: of the round that the save ends with.
    """

    def __init__(self, coordinator: Coordinator, topic: Topic) -> None:
        self._coordinator = coordinator
        self._topic = topic
        self._note = f"called_off/{topic.key}"
        self._reason: CheckpointError | None = None
        self._lock = threading.Lock()
        self._look_at = time.monotonic()

    def cancel(self) -> None:
        """Give the save up on every rank, unless it is committed first."""
        rank = self._coordinator.rank
        self._end(_cancelled(self._topic, rank))
        # Lost with the connection: then the round, too, ends without any of us.
        with suppress(CoordinationError):
            self._coordinator.post(self._note, str(rank).encode())

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
            CoordinationError: of the kind `CANCELLED`, `TIMEOUT` or `PEER_FAILED`.
        """
        if self._reason is None and self._is_time_to_look():
            self._look()
        if self._reason is not None:
            raise self._reason

    def confirm(self, deadline: Deadline) -> None:
        """Raise if the save may not be committed any more.

        Raises:
            CoordinationError: it was cancelled, or `deadline` has passed.
        """
        self._look()
        # Never after the deadline: a rank that has reported a failure must not be proved wrong.
        if deadline.passed:
            raise CoordinationError(
                f"{self._topic.label} took too long: {deadline.span_seconds:g} s are over",
                kind=ErrorKind.TIMEOUT,
                ranks={self._coordinator.rank: "took too long"},
            )
        self.check()

    def _look(self) -> None:
        with suppress(CoordinationError):
            rank = self._coordinator.look(self._note)
            if rank is not None:
                self._end(_cancelled(self._topic, int(rank)))

    def _is_time_to_look(self) -> bool:
        with self._lock:
            now = time.monotonic()
            if now < self._look_at:
                return False
            self._look_at = now + _LOOK_SECONDS
            return True

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
