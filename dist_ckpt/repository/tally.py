"""How much of some work is done, told as it goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from dist_ckpt import events
from dist_ckpt.storage.base import Stream


class Tally:
    """Counts the bytes of one part of some work, and tells each change of the sum.

    Args:
        url: the place that the work is for.
        doing: which part of it, for people.
        nbytes: how many bytes there are.
    """

    def __init__(self, url: str, doing: str, nbytes: int) -> None:
        self._url = url
        self._doing = doing
        self._total = nbytes
        self._done: dict[object, int] = {}
        self._sum = 0
        self._lock = threading.Lock()

    def note(self, item: object, nbytes: int) -> None:
        """Tell that of `item`, one of those that make up the work, so many bytes are done."""
        with self._lock:
            # By the difference, as a put that failed begins anew and its bytes count back.
            self._sum += nbytes - self._done.get(item, 0)
            self._done[item] = nbytes
            done = self._sum
        # Without the lock, since who hears of it may take long.
        events.emit(events.WorkProgressed(self._url, self._doing, done, self._total))

    def counted(self, item: object, stream: Stream) -> Stream:
        """Return `stream`, of which is noted what was taken; when it begins anew, so does that."""

        def pieces() -> Iterator[memoryview]:
            done = 0
            for piece in stream:
                done += piece.nbytes
                self.note(item, done)
                yield piece

        return Stream(stream.nbytes, pieces)
