"""A store in which a put goes on until it is ended or let go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fnmatch import fnmatchcase

from dist_ckpt.storage import Buffer, PutMode, Store, Watch
from dist_ckpt.testing.stores import FaultyStore

_LOOK_SECONDS = 0.002


class EndlessPut(FaultyStore):
    """Never comes to the end of a put whose key matches, and shows its watch that it is at work.

    Args:
        inner: the store that does the work.
        key: a glob.

    Attributes:
        reached: set once such a put is under way.
        let_go: set it to let them all come to an end.
    """

    def __init__(self, inner: Store, key: str) -> None:
        super().__init__(inner, [])
        self._key = key
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store `buffers`, some time."""
        if not fnmatchcase(key, self._key):
            super().put(key, buffers, mode=mode, watch=watch)
            return

        def crawl(nbytes: int) -> None:
            self.reached.set()
            while not self.let_go.wait(_LOOK_SECONDS):
                if watch is not None:
                    watch(0)
            if watch is not None:
                watch(nbytes)

        super().put(key, buffers, mode=mode, watch=crawl)
