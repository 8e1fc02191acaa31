"""The coordinator of a job that is one process."""

from __future__ import annotations

from dist_ckpt.errors import CheckpointError
from dist_ckpt.ranks.coordinator import Deadline, Decide, Topic
from dist_ckpt.ranks.failures import noted


class SoloCoordinator:
    """The whole job is this process."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._notes: dict[str, bytes] = {}

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        """Decide at once; see `Coordinator.round`."""
        if isinstance(message, BaseException):
            raise noted(topic.label, message)
        try:
            answer = decide([message])
        except Exception as error:
            noted(topic.label, error)
            raise
        return answer if isinstance(answer, bytes) else answer[0]

    def verdict(self, topic: Topic) -> CheckpointError | None:
        """Nobody else could have decided."""
        return None

    def post(self, name: str, data: bytes) -> None:
        """Put a note up; see `Coordinator.post`."""
        self._notes[name] = data

    def look(self, name: str) -> bytes | None:
        """Return a note; see `Coordinator.look`."""
        return self._notes.get(name)

    def leave(self, deadline: Deadline) -> None:
        """Nobody else is there."""
