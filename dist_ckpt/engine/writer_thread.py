"""The one background thread of a rank."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable


class WriterThread:
    """Runs jobs one after another on a daemon thread that starts with the first one.

    A daemon, because a backend that never answers must not keep a process from ending; who must not
    lose a save at exit waits for it (`dist_ckpt.engine.saving.Saver.close`).
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the background; it must not raise. The caller waits for the one before."""
        # Not alive: a listener or a backend ended it with SystemExit, or this process was forked.
        if self._jobs is None or self._thread is None or not self._thread.is_alive():
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name="dist_ckpt-writer", daemon=True
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
        """Wait until no job runs; return whether that is so."""
        return self._idle.wait(timeout)

    def abandon(self) -> None:
        """Leave a job that does not come back; the next one gets a thread of its own."""
        self.stop()
        self._idle = threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Let the thread end when its job is done."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # else it, and all that it looks at, would live until the next one
