"""Whether a save is still wanted: asked before every piece that leaves, and before the commit."""

from __future__ import annotations

import threading

from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, describe
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic


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
