"""The background threads of a rank: one writes, and on rank 0 another tidies up."""

from __future__ import annotations

import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

_NICE = 10
"""How much later than the training this is served by the processors, as `nice` counts."""


_changed = threading.Condition()
# Threads that run a job or let go of what it held. Not those that were left to themselves.
_at_work: set[threading.Thread] = set()


def wait_for_threads(seconds: float) -> bool:
    """Wait until no background thread has anything in its hands; return whether that is so.

    A daemon that lets go of a tensor while the interpreter goes ends the process by an abort: torch
    asks for the interpreter in a destructor, which must not be left by an exception.
    """
    with _changed:
        return _changed.wait_for(lambda: not _at_work, seconds)


def _forget_threads() -> None:
    global _changed
    # None of them is here, and one may have held the lock.
    _changed = threading.Condition()
    _at_work.clear()


os.register_at_fork(after_in_child=_forget_threads)


class WriterThread:
    """Runs jobs one after another on a daemon thread that starts with the first one.

    A daemon, because a backend that never answers must not keep a process from ending; who must not
    lose a save at exit waits for it (`dist_ckpt.saving.saver.Saver.close`).

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "dist_ckpt-writer") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the background, after those before it; it must not raise."""
        # Not alive: a listener or a backend ended it with SystemExit, or this process was forked.
        if self._jobs is None or self._thread is None or not self._thread.is_alive():
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name=self._name, daemon=True
            )
            self._thread.start()
            # The thread knows the queue alone, so it ends with an owner that forgot to stop it.
            weakref.finalize(self, self._jobs.put, None).atexit = False
        # Of this job alone: one that was given up must not make the next one look finished.
        idle = self._idle = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                idle.set()

        self._jobs.put(run)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no job runs or waits; return whether that is so."""
        return self._idle.wait(timeout)

    def abandon(self) -> None:
        """Leave a job that does not come back; the next one gets a thread of its own."""
        self.stop()
        with _changed:
            _at_work.difference_update([self._thread] if self._thread else [])
            _changed.notify_all()
        self._idle = threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Let the thread end when its jobs are done."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    _yield_to_training()
    me = threading.current_thread()
    while (job := jobs.get()) is not None:
        with _changed:
            _at_work.add(me)
        try:
            job()
        finally:
            del job  # else it, and all that it looks at, would live until the next one
            with _changed:
                _at_work.discard(me)
                _changed.notify_all()


def _yield_to_training() -> None:
    """Let this thread, and those that it starts, have what the training leaves of the processors.

    On Linux a priority is that of a thread; elsewhere it would slow the whole process down.
    """
    if sys.platform == "linux":
        # Refused in some sandboxes: then saving competes with the training, and is as right.
        with suppress(OSError):
            thread = threading.get_native_id()
            nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
