"""Stores that fail, crash or dawdle on purpose. Each wraps another store and is one itself."""

from __future__ import annotations

import os
import signal as signals
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from dist_ckpt.errors import UsageError
from dist_ckpt.storage.base import Buffer, PutMode, Scatter, Store, Watch, fill_views, flat_views
from dist_ckpt.storage.wrapper import CHANGES, OPERATIONS, Operation, StoreWrapper

__all__ = [
    "CHANGES",
    "OPERATIONS",
    "CrashStore",
    "Fail",
    "Fault",
    "FaultyStore",
    "Flip",
    "Hang",
    "LatencyStore",
    "Operation",
    "Rule",
    "Truncate",
]

_T = TypeVar("_T")


class _KeyByKey(StoreWrapper):
    """Deletes key by key, so that each removal can be interrupted."""

    delete_batch = 1


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise `error`; with `after=True` once the operation is done, as when an answer is lost."""

    error: BaseException
    after: bool = False


class Hang:
    """Hold the operation until `release` is called, then let it go on.

    `reached` is set once an operation hangs, so that a test can wait for that without sleeping.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        """Let what hangs here go on, and never hold anything again."""
        self._released.set()

    def hold(self) -> None:
        """Block until released."""
        self.reached.set()
        self._released.wait()


@dataclass(frozen=True, slots=True)
class Truncate:
    """Let only the first `nbytes` of the operation's bytes be stored, or be read."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Flip:
    """Flip the lowest bit of byte `at` of what the operation stores or reads; -1 is the last."""

    at: int = 0


Fault = Fail | Hang | Truncate | Flip


@dataclass(frozen=True, slots=True)
class Rule:
    """When a fault happens.

    Attributes:
        operation: of which kind the operation must be.
        fault: what then happens. `Truncate` and `Flip` go with `put` and `read_into` only.
        key: a glob that its key, or the prefix of a listing, must match; `*` matches `/` too.
        nth: of the operations that match so far, counted from 1; None: every one of them.
    """

    operation: Operation
    fault: Fault
    key: str = "*"
    nth: int | None = 1

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise UsageError(f"unknown operation {self.operation!r}: one of {sorted(OPERATIONS)}")
        if self.nth is not None and self.nth < 1:
            raise UsageError(f"nth is {self.nth}, but operations are counted from 1")
        moves_bytes = self.operation in ("put", "read_into")
        if isinstance(self.fault, Truncate | Flip) and not moves_bytes:
            raise UsageError(f"{self.operation} moves no bytes that {self.fault} could damage")


class FaultyStore(_KeyByKey):
    """A store in which things go wrong as `rules` say.

    All rules that match an operation apply, in their order.

    Args:
        inner: the store that does the work.
        rules: what goes wrong, and when.
    """

    def __init__(self, inner: Store, rules: Sequence[Rule]) -> None:
        super().__init__(inner)
        self._rules = tuple(rules)
        self._lock = threading.Lock()
        self._matches = [0] * len(self._rules)
        self._fired = [0] * len(self._rules)

    @property
    def fired(self) -> list[int]:
        """How often each rule took effect: a test should see that its fault happened."""
        with self._lock:
            return list(self._fired)

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store what the rules leave of `buffers`. See `Store.put`."""
        faults = self._faults("put", key)
        if any(isinstance(fault, Truncate | Flip) for fault in faults):
            # Damaged in a copy: the caller's own bytes stay as they are.
            data = bytearray().join(flat_views(buffers))
            buffers = [data[: _damage(faults, [memoryview(data)], len(data))]]
        _run(faults, lambda: self.inner.put(key, buffers, mode=mode, watch=watch))

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Read, then damage what was read as the rules say. See `Store.read_into`."""
        faults = self._faults("read_into", key)
        count = _run(faults, lambda: self.inner.read_into(key, offset, *buffers))
        return _damage(faults, fill_views(offset, buffers), count)

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        return _run(self._faults(operation, key), run)

    def _faults(self, operation: Operation, key: str) -> list[Fault]:
        faults: list[Fault] = []
        # Counted under the lock, acted on outside it: a hanging operation holds up no other.
        with self._lock:
            for number, rule in enumerate(self._rules):
                if rule.operation != operation or not fnmatchcase(key, rule.key):
                    continue
                self._matches[number] += 1
                if rule.nth in (None, self._matches[number]):
                    self._fired[number] += 1
                    faults.append(rule.fault)
        return faults


class CrashStore(_KeyByKey):
    """A store that ends its own process at a chosen operation, as a crash would.

    Run once with `at=None` to learn from `operations` how many there are, then once for each
    number up to that, each time in a process of its own.

    Args:
        inner: the store that does the work.
        at: the number of the operation at which to crash, from 1; None: never, only count.
        when: "before" that operation, or "after" it was done.
        kinds: which operations count.
        signal: what the process sends to itself.
    """

    def __init__(
        self,
        inner: Store,
        *,
        at: int | None = None,
        when: Literal["before", "after"] = "before",
        kinds: Iterable[Operation] = OPERATIONS,
        signal: int = signals.SIGKILL,
    ) -> None:
        super().__init__(inner)
        if at is not None and at < 1:
            raise UsageError(f"at is {at}, but operations are counted from 1")
        if when not in ("before", "after"):
            raise UsageError(f"bad when {when!r}: must be 'before' or 'after'")
        self._at = at
        self._when = when
        self._kinds = frozenset(kinds)
        self._signal = signal
        self._lock = threading.Lock()
        self._log: list[tuple[Operation, str]] = []

    @property
    def operations(self) -> list[tuple[Operation, str]]:
        """The kind and the key of each operation counted so far, in the order of their starts."""
        with self._lock:
            return list(self._log)

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        if operation not in self._kinds:
            return run()
        with self._lock:
            # As it begins: of operations of several threads that is the one order there is.
            self._log.append((operation, key))
            number = len(self._log)
        if number == self._at and self._when == "before":
            self._crash()
        try:
            return run()
        finally:
            # Also when the operation failed: "no such key" is an answer like any other.
            if number == self._at and self._when == "after":
                self._crash()

    def _crash(self) -> None:
        # A signal to oneself arrives before kill returns, so nothing more of this thread runs.
        os.kill(os.getpid(), self._signal)


class LatencyStore(_KeyByKey):
    """A store every operation of which takes `seconds` longer, as over a network.

    Args:
        inner: the store that does the work.
        seconds: added before each operation.
        sleep: how to wait; a test passes one that only notes the seconds.
    """

    def __init__(
        self, inner: Store, seconds: float, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(inner)
        self._seconds = seconds
        self._sleep = sleep

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        # Under no lock: operations wait side by side, as requests do.
        self._sleep(self._seconds)
        return run()


def _run(faults: Sequence[Fault], run: Callable[[], _T]) -> _T:
    for fault in faults:
        if isinstance(fault, Hang):
            fault.hold()
        elif isinstance(fault, Fail) and not fault.after:
            raise fault.error
    result = run()
    for fault in faults:
        # Those before the operation were raised there: these are answers that got lost.
        if isinstance(fault, Fail):
            raise fault.error
    return result


def _damage(faults: Sequence[Fault], views: Sequence[memoryview], count: int) -> int:
    """Flip bits in the first `count` bytes of `views`; return how many of them shall be left."""
    left = count
    for fault in faults:
        if isinstance(fault, Truncate):
            left = min(left, fault.nbytes)
        elif isinstance(fault, Flip):
            if not -count <= fault.at < count:
                raise UsageError(f"{fault} lies outside the {count} bytes of the operation")
            at = fault.at if fault.at >= 0 else count + fault.at
            # The byte may lie in any of the buffers, which are filled as if they were one.
            (view,) = Scatter(views).cut(at, at + 1)
            view[0] ^= 1
    return left
