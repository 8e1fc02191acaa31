"""Counting what a store does: operations, bytes, retries and latencies, told as events."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from dist_ckpt import events
from dist_ckpt.errors import AlreadyExists, CheckpointError, NotFound
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


@dataclass(slots=True)
class _Sums:
    count: int = 0
    failed: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    latencies: Counter[int] = field(default_factory=Counter)


class MeterStore(StoreWrapper):
    """A store that counts what it does, and emits each operation as an event.

    Args:
        inner: the store that does the work.
        clock: seconds that never go back.
    """

    def __init__(self, inner: Store, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self._clock = clock
        self._lock = threading.Lock()
        self._sums: dict[str, _Sums] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process counts what it does itself.
        return {**self.__dict__, "_lock": None, "_sums": {}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store `buffers` and count their bytes. See `Store.put`."""
        nbytes = sum(view.nbytes for view in flat_views(buffers))
        run = partial(self.inner.put, key, buffers, mode=mode, watch=watch)
        self._measured("put", key, run, lambda _: nbytes)

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Store what `stream` makes and count its bytes. See `Streamer.put_stream`."""
        run = partial(put_stream, self.inner, key, stream, mode=mode)
        self._measured("put", key, run, lambda _: stream.nbytes)

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Read and count the bytes that there were. See `Store.read_into`."""
        run = partial(self.inner.read_into, key, offset, *buffers)
        return self._measured("read_into", key, run, lambda count: count)

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects; the time is that of the whole listing. See `Store.list_entries`."""
        entries = self.inner.list_entries(prefix)
        return self._listing(prefix, entries)

    def usage(self) -> events.StorageUsed:
        """Return what was counted so far."""
        with self._lock:
            operations = {
                operation: events.OperationUse(
                    sums.count, sums.failed, sums.nbytes, sums.seconds, dict(sums.latencies)
                )
                for operation, sums in self._sums.items()
            }
        return events.StorageUsed(self.url, operations=operations, retries=self.retries)

    def close(self) -> None:
        """Tell what was counted, then close the inner store."""
        events.emit(self.usage())
        self.inner.close()

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        return self._measured(operation, key, run, lambda _: 0)

    def _listing(self, prefix: str, entries: Iterator[Entry]) -> Iterator[Entry]:
        # The requests are made while it is iterated over, and so is what the caller does: only
        # the time inside the store counts.
        began = self._clock()
        seconds = 0.0
        error: CheckpointError | None = None
        try:
            for entry in entries:
                seconds += self._clock() - began
                yield entry
                began = self._clock()
        except CheckpointError as failure:
            error = failure
            raise
        finally:
            self._note(events.StorageOperation(self.url, "list_entries", prefix, 0, seconds, error))

    def _measured(
        self,
        operation: Operation,
        key: str,
        run: Callable[[], _T],
        nbytes_of: Callable[[_T], int],
    ) -> _T:
        began = self._clock()
        nbytes = 0
        failure: CheckpointError | None = None
        try:
            result = run()
            nbytes = nbytes_of(result)
        except CheckpointError as error:
            failure = error
            raise
        finally:
            seconds = self._clock() - began
            self._note(events.StorageOperation(self.url, operation, key, nbytes, seconds, failure))
        return result

    def _note(self, event: events.StorageOperation) -> None:
        with self._lock:
            sums = self._sums.setdefault(event.operation, _Sums())
            sums.count += 1
            # "No such key" and "already there" are answers like any other.
            sums.failed += event.error is not None and not isinstance(
                event.error, NotFound | AlreadyExists
            )
            sums.nbytes += event.nbytes
            sums.seconds += event.seconds
            sums.latencies[bucket(event.seconds)] += 1
        # Without the lock, as whoever hears of it may ask for `usage`.
        events.emit(event)


def bucket(seconds: float) -> int:
    """Return the least power of two, in milliseconds, that is not below `seconds`; at least 1."""
    return 1 << (max(1, math.ceil(seconds * 1000)) - 1).bit_length()
