"""What happened, as plain values, told at once to whoever subscribed in this process.

Events are for people and monitoring. No part of dist_ckpt decides anything by them, and a
listener that fails is reported by the log and cannot fail a save. Listeners are called on the
thread where the thing happened, which for most events is the background writer thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dist_ckpt.errors import CheckpointError, describe


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events: which run, which step, which rank."""

    url: str
    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class SaveStaged(Event):
    """This rank's share is in host memory; the training step goes on."""

    save_id: str
    nbytes: int
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class FileWritten(Event):
    """One file of this rank is durable under `key`."""

    save_id: str
    key: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveCommitted(Event):
    """The checkpoint exists; `nbytes` and the times are this rank's."""

    save_id: str
    nbytes: int
    stall_seconds: float
    write_seconds: float
    commit_seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed(Event):
    """The save ended without a checkpoint, on every rank."""

    error: CheckpointError


@dataclass(frozen=True, slots=True)
class CheckpointRefused(Event):
    """A restore passed over this checkpoint and tried an older one."""

    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointRestored(Event):
    """This rank's state is that of the checkpoint; `nbytes` were read by this rank."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointDeleted(Event):
    """Retention removed this checkpoint."""

    reason: str


@dataclass(frozen=True, slots=True)
class RetentionFailed(Event):
    """Retention could not finish after the commit of `step`; the commit stands."""

    error: CheckpointError


Listener = Callable[[Event], None]

_log = logging.getLogger("dist_ckpt")
_listeners: list[Listener] = []
_lock = threading.Lock()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every later event of this process; return a function that ends it."""
    with _lock:
        _listeners.append(listener)

    def unsubscribe() -> None:
        with _lock:
            if listener in _listeners:
                _listeners.remove(listener)

    return unsubscribe


def emit(event: Event) -> None:
    """Tell every listener of `event`."""
    with _lock:
        listeners = tuple(_listeners)
    for listener in listeners:
        try:
            listener(event)
        except Exception as error:
            # Logged, not warned: where warnings are errors, a warning would fail the save.
            _log.warning(
                "listener %r failed on %s: %s",
                listener,
                type(event).__name__,
                describe(error),
                exc_info=error,
            )
