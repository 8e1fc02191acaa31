"""Trying again: how long to wait, how often, and a store that does it for any other store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_ckpt.errors import AlreadyExists, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.storage.base import (
    Buffer,
    Entry,
    PutMode,
    Store,
    Stream,
    Watch,
    flat_views,
    put_stream,
)
from dist_ckpt.storage.wrapper import Operation, StoreWrapper

_T = TypeVar("_T")

TRANSIENT = frozenset({ErrorKind.STORAGE, ErrorKind.TIMEOUT})
"""What may be over by the next attempt; a full or forbidden place will not change by itself."""

# What a comparison takes of memory, however large the object is.
_COMPARED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often to try, and how long to wait in between.

    Attributes:
        attempts: how often at most, the first time included.
        first_seconds: the longest wait after the first failure; it doubles with each one.
        longest_seconds: where doubling ends.
        total_seconds: no attempt begins later than this after the first one.
    """

    attempts: int = 8
    first_seconds: float = 0.1
    longest_seconds: float = 20.0
    total_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UsageError(f"attempts must be at least 1, not {self.attempts}")

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after that many failures.

        Args:
            failures: so far, from 1.
            chance: a random number from 0 to 1, so that many writers do not come back at once.
        """
        # Bounded, as a float cannot hold 2 to the power of 1024; doubling has ended long before.
        most = min(self.longest_seconds, self.first_seconds * 2.0 ** min(failures - 1, 60))
        # Half of it is certain: a server that asks for less must get a pause from everybody.
        return most * (1 + chance) / 2

    def allows(self, failures: int, waited_seconds: float) -> bool:
        """Whether another attempt may follow after that many failures and seconds."""
        return failures < self.attempts and waited_seconds < self.total_seconds


class RetryStore(StoreWrapper):
    """A store that repeats what failed for a reason that may pass.

    Nothing else is repeated: a missing key, a missing right, a full place and a wrong call stay
    what they are.

    Args:
        inner: the store that does the work.
        backoff: how often, and how long to wait.
        sleep: how to wait; a test passes one that only notes the seconds.
    """

    def __init__(
        self,
        inner: Store,
        backoff: Backoff | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._retries = 0

    def __getstate__(self) -> dict[str, Any]:
        # Another process counts its own.
        return {**self.__dict__, "_lock": None, "_retries": 0}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def retries(self) -> int:
        """How many attempts were repetitions, those of the inner store included."""
        with self._lock:
            return self._retries + super().retries

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store `buffers`, whose bytes must be this writer's own. See `Store.put`.

        The answer of an attempt that took effect may be lost, and the next one then meets what
        this writer created itself: what is stored decides, not what the backend said.
        """
        self._put(
            key,
            lambda: self.inner.put(key, buffers, mode=mode, watch=watch),
            lambda: self._holds(key, flat_views(buffers)),
        )

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Store what `stream` makes, and makes again where an attempt fails. See `put`."""
        self._put(
            key,
            lambda: put_stream(self.inner, key, stream, mode=mode),
            lambda: self._holds(key, stream, nbytes=stream.nbytes),
        )

    def _put(self, key: str, put: Callable[[], None], is_there: Callable[[], bool]) -> None:
        failed = False

        def attempt() -> None:
            nonlocal failed
            try:
                put()
            except AlreadyExists:
                # What is met by the first attempt is another writer's, be its bytes the same: only
                # after a failure can it be our own, with the answer lost.
                if not failed or not is_there():
                    raise
            except StorageError:
                failed = True
                raise

        self.around("put", key, attempt)

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Return the whole listing, so that one which breaks off is repeated from its begin."""
        return self.around(
            "list_entries", prefix, lambda: iter(list(self.inner.list_entries(prefix)))
        )

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        failures = 0
        began = time.monotonic()
        while True:
            try:
                return run()
            except StorageError as error:
                failures += 1
                again = self._backoff.allows(failures, time.monotonic() - began)
                if error.kind not in TRANSIENT or not again:
                    raise
            with self._lock:
                self._retries += 1
            self._sleep(self._backoff.delay(failures, random.random()))

    def _holds(self, key: str, views: Iterable[memoryview], nbytes: int | None = None) -> bool:
        """Whether the object under `key` is the concatenation of `views`, of `nbytes` in all."""
        found = memoryview(bytearray(_COMPARED_BYTES))
        offset = 0
        try:
            if nbytes is None:
                nbytes = sum(view.nbytes for view in views)
            # Asked first, as it tells most objects of others apart before a byte of them is read.
            if self.inner.size(key) != nbytes:
                return False
            for view in views:
                for start in range(0, view.nbytes, _COMPARED_BYTES):
                    wanted = view[start : start + _COMPARED_BYTES]
                    count = self.inner.read_into(key, offset, found[: wanted.nbytes])
                    if found[:count] != wanted:
                        return False
                    offset += count
        except NotFound:
            return False
        return True
