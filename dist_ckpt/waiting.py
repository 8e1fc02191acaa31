"""Waiting for other threads in a way that an interrupt cannot break.

Python's own ways break when the handler of a signal raises inside of them, as Ctrl-C does in the
main thread. `threading.Condition`, and with it `Event`, `Semaphore` and `Future.result`, keep a
lock for ever, on which the other side then hangs, or raise `RuntimeError` instead: 10 and 3 of
1,000 interrupted waits of CPython 3.11. `Thread.join` takes a running thread for ended from then
on. Here a thread that waits holds nothing that anybody else needs: it sleeps on a lock of its own.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")

_NAP_SECONDS = 1.0
"""How long a thread sleeps at a time: a signal just before a sleep is handled after it."""


class Bell:
    """Tells threads that wait for a change to look again."""

    def __init__(self) -> None:
        # Looked at by single operations, which neither threads nor interrupts see half done.
        self._sleepers: set[threading.Lock] = set()

    def ring(self) -> None:
        """Let all that wait look again."""
        for sleeper in tuple(self._sleepers):
            # It stays in the set until it is up: a ring that is interrupted can be repeated.
            with suppress(RuntimeError):
                sleeper.release()

    def wait_for(self, look: Callable[[], _T], timeout: float | None = None) -> _T:
        """Call `look` now and after each ring until it returns something true, and return that.

        Args:
            look: called in this thread.
            timeout: after so many seconds what `look` returned last is returned, None for never.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            try:
                self._sleepers.add(sleeper)  # before the look, so that no change is missed
                found = look()
                left = until - time.monotonic()
                if found or left <= 0:
                    return found
                sleeper.acquire(timeout=min(left, _NAP_SECONDS))
            finally:
                self._sleepers.discard(sleeper)


class Latch:
    """Opens once and stays open, like a `threading.Event` that is never cleared."""

    def __init__(self) -> None:
        self._is_open = False
        self._bell = Bell()

    def open(self) -> None:
        """Let all go on that wait, now and later."""
        self._is_open = True
        self._bell.ring()

    @property
    def is_open(self) -> bool:
        """Whether nobody has to wait any more."""
        return self._is_open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is open, for at most `timeout` seconds; return whether it is."""
        return self._bell.wait_for(lambda: self._is_open, timeout)


def start(thread: threading.Thread) -> None:
    """Start `thread`.

    Raises:
        RuntimeError: no more threads can be had.
        BaseException: an interrupt; the thread may have been started.
    """
    try:
        thread.start()
    except RuntimeError as error:
        if error.__context__ is not None:  # it broke the wait that is in there
            raise error.__context__ from None
        raise


class Worker:
    """A thread that does one piece of work, and can be waited for any number of times."""

    def __init__(self, work: Callable[[], None], *, name: str, daemon: bool) -> None:
        """Prepare the thread.

        Args:
            work: what to do; it must not raise.
            name: of the thread.
            daemon: whether the process may end before the work does.
        """
        self._work = work
        self._lock = threading.Lock()
        self._is_asked = False
        self._is_begun = False
        self._over = Latch()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=daemon)

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: no more threads can be had; then, and after an interrupt, the work is not
                begun any more unless it was.
        """
        try:
            self._is_asked = True
            start(self._thread)
        except BaseException:
            if self._may_begin():
                self._over.open()
            raise

    def wait(self) -> None:
        """Wait until the work is over.

        Nobody waits for what was never begun, as by an interrupt just before `start`, nor in a
        forked child, where there is no such thread.
        """
        if self._is_asked and self._pid == os.getpid():
            self._over.wait()

    def _may_begin(self) -> bool:
        with self._lock:
            first, self._is_begun = not self._is_begun, True
        return first

    def _run(self) -> None:
        if not self._may_begin():
            return
        work = self._work
        del self._work  # with all that it looks at
        try:
            work()
        finally:
            del work
            self._over.open()
