"""Work shared out over threads that end before the caller goes on, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


def in_parallel(work: Callable[[ItemT], None], items: Iterable[ItemT], *, threads: int) -> None:
    """Call `work` on each of `items`, in up to `threads` threads, of which this one is the first.

    Items are taken in their order, one at a time, so `items` may be a generator. No thread of this
    runs any more when it returns or raises: what the work uses may then be closed.

    The threads are made here and not kept: a pool would not survive a fork, would have to be
    closed, and takes no more work while the interpreter ends, which is when last saves are written.

    Raises:
        BaseException: the first failure of any call; what was not begun by then is left out.
    """
    shared = _Shared(work, items)
    helpers: list[threading.Thread] = []
    try:
        for _ in range(threads - 1):
            helper = threading.Thread(target=shared.run, name="dist_ckpt-io")
            try:
                helper.start()
            except RuntimeError:
                break  # no more threads can be had: those there are do it, in more time
            helpers.append(helper)
        shared.run()
        _join(helpers)
    except BaseException:
        # An interrupt while waiting: the threads still use what the caller is about to close.
        shared.stop.set()
        _join(helpers)
        raise
    if shared.failures:
        raise shared.failures[0]


class _Shared(Generic[ItemT]):
    """What the threads of one call have in common."""

    def __init__(self, work: Callable[[ItemT], None], items: Iterable[ItemT]) -> None:
        self._work = work
        self._items = iter(items)
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.failures: list[BaseException] = []

    def run(self) -> None:
        """Take items until there is none left or a thread failed."""
        try:
            while not self.stop.is_set() and (taken := self._take()):
                self._work(taken[0])
        except BaseException as error:
            # Kept for the caller: a thread that fails unheard would make half a file a success.
            self.failures.append(error)
            self.stop.set()

    def _take(self) -> list[ItemT]:
        # A generator cannot be resumed by two threads at once.
        with self._lock:
            return list(islice(self._items, 1))


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
