"""Doing less at once: fixed limits around any store, and one that finds itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from dist_ckpt.errors import UsageError
from dist_ckpt.storage.base import Buffer, PutMode, Store, Stream, Watch, fill_views, flat_views
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from dist_ckpt.threads import Bell

_T = TypeVar("_T")

_PAUSE_SECONDS = 1.0
"""Requests that were under way together are slowed down together: they count as one complaint."""


def _is_above_0(value: Any, kind: type[Any]) -> bool:
    # Those of numpy are such numbers, too, and `True` is none.
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


class LimitStore(StoreWrapper):
    """A store used by so many threads at once, and so fast, at most.

    Args:
        inner: the store that does the work.
        max_concurrent: how many operations run at once; None: any number.
        max_bytes_per_second: of what is put and read together, on average; None: no limit.
        clock: seconds that never go back.
        sleep: how to wait; a test passes one that moves the clock.
    """

    def __init__(
        self,
        inner: Store,
        *,
        max_concurrent: int | None = None,
        max_bytes_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        if max_concurrent is not None and not _is_above_0(max_concurrent, Integral):
            raise UsageError(
                f"max_concurrent must be at least 1, a whole number, not {max_concurrent!r}"
            )
        rate = max_bytes_per_second
        if rate is not None and not _is_above_0(rate, Real):
            raise UsageError(f"max_bytes_per_second must be a number above 0, not {rate!r}")
        self._most = max_concurrent
        self._rate = max_bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        # The limits are those of each process: none knows what the others have under way.
        of_process = {"_lock": None, "_running": None, "_ended": None}
        return {**self.__dict__, **of_process}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._running: set[object] = set()
        self._ended = Bell()
        self._lock = threading.Lock()
        self._free_at = self._clock()

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Wait until the bytes may go, then store them. See `Store.put`."""
        self._pace(sum(view.nbytes for view in flat_views(buffers)))
        super().put(key, buffers, mode=mode, watch=watch)

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Wait until the bytes may go, then store them. See `Streamer.put_stream`."""
        self._pace(stream.nbytes)
        super().put_stream(key, stream, mode=mode)

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Wait until the bytes may come, then read them. See `Store.read_into`."""
        asked = sum(view.nbytes for view in fill_views(offset, buffers))
        self._pace(asked)
        count = super().read_into(key, offset, *buffers)
        self._give_back(asked - count)
        return count

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        if self._most is None:
            return run()
        # Named, not counted: what an interrupt kept from beginning is not taken back from others.
        me = object()
        try:
            self._ended.wait_for(lambda: self._enter(me))
            return run()
        finally:
            # Whether it had begun or not: an interrupt may come at any moment.
            self._running.discard(me)
            self._ended.ring()

    def _enter(self, me: object) -> bool:
        with self._lock:
            is_free = self._most is None or len(self._running) < self._most
            if is_free:
                self._running.add(me)
        return is_free

    def _pace(self, nbytes: int) -> None:
        """Wait for what went before; the bytes of now are waited for by whoever comes next."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            # Never earlier than now: a pause saves nothing up for a burst after it.
            begin = max(now, self._free_at)
            self._free_at = begin + nbytes / self._rate
        if begin > now:
            # Without the lock, so that others can book their time behind this one meanwhile.
            self._sleep(begin - now)

    def _give_back(self, nbytes: int) -> None:
        """Take back bytes that `_pace` counted and that never came: the object is shorter."""
        if self._rate is not None:
            with self._lock:
                self._free_at -= nbytes / self._rate


class AdaptiveLimit:
    """How many requests to have under way, found from what the server says: a pure number.

    It rises by about one for each full round of successes and is halved by a complaint.

    Args:
        most: the limit to begin with, and never to pass.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise UsageError(f"the most requests at once must be at least 1, not {most}")
        self._most = float(most)
        self._limit = self._most
        self._quiet_until = float("-inf")

    @property
    def limit(self) -> int:
        """How many requests may be under way now; at least 1."""
        return int(self._limit)

    def succeeded(self) -> None:
        """Note a request that the server answered."""
        self._limit = min(self._most, self._limit + 1 / self._limit)

    def throttled(self, now_seconds: float) -> None:
        """Note that the server asked for less at that time."""
        if now_seconds >= self._quiet_until:
            self._limit = max(1.0, self._limit / 2)
            self._quiet_until = now_seconds + _PAUSE_SECONDS
