"""What happened, as plain values, told at once to whoever subscribed in this process.

Events are for people and monitoring. No part of dist_ckpt decides anything by them, and a
listener that fails is reported by the log and cannot fail a save. Listeners are called on the
thread where the thing happened, which for most events is the background writer thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dist_ckpt.errors import CheckpointError, describe, without_secrets


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events: which place.

    Attributes:
        url: without user, password and arguments, whatever was given.
    """

    url: str

    def __post_init__(self) -> None:
        """Keep secrets out of what goes to monitoring."""
        # Here, as every event comes by: the class is frozen, and nobody has seen this one yet.
        object.__setattr__(self, "url", without_secrets(self.url))


@dataclass(frozen=True, slots=True)
class StepEvent(Event):
    """Base of what happens to one checkpoint: which step, which rank."""

    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class SaveStaged(StepEvent):
    """This rank's share is in host memory; the training step goes on."""

    save_id: str
    nbytes: int
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class SaveProgressed(StepEvent):
    """This rank went on: told at every change of phase, and about 16 times while it writes.

    Attributes:
        save_id: the attempt.
        phase: "staging", "writing", "committing" or "done", in this order.
        nbytes_done: what this rank has handed to storage.
        nbytes_total: what it has to write.
    """

    save_id: str
    phase: str
    nbytes_done: int
    nbytes_total: int


@dataclass(frozen=True, slots=True)
class FileWritten(StepEvent):
    """One file of this rank is durable under `key`."""

    save_id: str
    key: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveCommitted(StepEvent):
    """The checkpoint exists; `nbytes` and the times are this rank's."""

    save_id: str
    nbytes: int
    stall_seconds: float
    write_seconds: float
    commit_seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed(StepEvent):
    """The save ended without a checkpoint, on every rank.

    Attributes:
        error: what this rank is told; a foreign error is the `__cause__` of a `CheckpointError`.
    """

    error: CheckpointError


@dataclass(frozen=True, slots=True)
class SaveCancelled(StepEvent):
    """The save was given up on every rank because somebody asked for it."""

    save_id: str


@dataclass(frozen=True, slots=True)
class SaveSkipped(StepEvent):
    """Nothing is saved, on any rank: the save before was still in flight on one of them."""


@dataclass(frozen=True, slots=True)
class CheckpointRefused(StepEvent):
    """A restore passed over this checkpoint and tried an older one."""

    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointRestored(StepEvent):
    """This rank's state is that of the checkpoint; `nbytes` were read by this rank."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointDeleted(StepEvent):
    """Retention removed this checkpoint."""

    reason: str


@dataclass(frozen=True, slots=True)
class RetentionFailed(StepEvent):
    """Retention could not finish after the commit of `step`; the commit stands."""

    error: CheckpointError


@dataclass(frozen=True, slots=True)
class PassedBy(Event):
    """Something in the place is left alone, and nothing waits for it; told once in a process.

    Attributes:
        reason: what it is, and why.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class MetricsDiffer(StepEvent):
    """Told by rank 0 once for each name: another rank gave another value; `stored` counts.

    Attributes:
        name: the metric.
        stored: what rank 0 gave, None when it gave none.
        other_rank: a rank that gave something else.
        other: what that was.
    """

    name: str
    stored: float | None
    other_rank: int
    other: float


@dataclass(frozen=True, slots=True)
class WorkProgressed(Event):
    """A copy, an export, an import or an average went on: told for about each 16 MiB.

    Attributes:
        doing: which part of the work, as "copying step 100", "reading" or "reading back".
        nbytes_done: how much of that part is done.
        nbytes_total: how much there is.
    """

    doing: str
    nbytes_done: int
    nbytes_total: int


@dataclass(frozen=True, slots=True)
class OperationUse:
    """What all operations of one kind on one store came to.

    Attributes:
        count: how many ended.
        failed: how many of them by an error other than "not found" and "already exists".
        nbytes: put or read by those that did not fail.
        seconds: the sum of their times.
        latencies: how many took at most that many milliseconds, but more than half of it; the
            keys are powers of two.
    """

    count: int
    failed: int
    nbytes: int
    seconds: float
    latencies: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class StorageOperation(Event):
    """A store did something, or failed to: `nbytes` were put or read."""

    operation: str
    key: str
    nbytes: int
    seconds: float
    error: CheckpointError | None


@dataclass(frozen=True, slots=True)
class StorageUsed(Event):
    """What a metered store did in all, told when it is closed.

    Attributes:
        operations: by kind: how many, how many failed, bytes, and the latencies.
        retries: how many requests were repetitions of failed ones.
    """

    operations: Mapping[str, OperationUse]
    retries: int


Listener = Callable[[Event], None]

_log = logging.getLogger("dist_ckpt")
_listeners: list[Listener] = []
# For the life of the process: a run is looked at again and again.
_told: set[tuple[str, str]] = set()
# Things happen on several threads, and a program subscribes from any.
_lock = threading.Lock()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every later event of this process; return a function that ends it."""
    with _lock:
        _listeners.append(listener)

    def unsubscribe() -> None:
        with _lock:
            # To call it again is no error.
            if listener in _listeners:
                _listeners.remove(listener)

    return unsubscribe


def emit(event: Event) -> None:
    """Tell every listener of `event`."""
    with _lock:
        # Told without the lock: a listener may unsubscribe, or do what makes another event.
        listeners = tuple(_listeners)
    for listener in listeners:
        try:
            listener(event)
        except BaseException as error:
            on_main = threading.current_thread() is threading.main_thread()
            if on_main and not isinstance(error, Exception):
                raise  # an interrupt, or sys.exit(): it is meant for the program
            # On another thread nobody is above it: it would end a save that others wait for.
            # Logged, not warned: where warnings are errors, a warning would fail the save.
            _log.warning(
                "listener %r failed on %s: %s",
                listener,
                type(event).__name__,
                describe(error),
                exc_info=error,
            )


def tell_once(url: str, message: str) -> None:
    """Warn of something in the place `url` that is passed by, once in this process.

    Such things stay where they are, and would be told again at every look.
    """
    # First: one place with two signatures is told once.
    message = without_secrets(message)
    with _lock:
        # Noted under the lock and said without it: of two threads that come across it one says it,
        # and a slow log holds up no other.
        if (url, message) in _told:
            return
        _told.add((url, message))
    _log.warning("%s", message)
    emit(PassedBy(url, message))
