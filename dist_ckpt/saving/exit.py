"""The end of the process, in one order: saves, failures that nobody heard of, connections.

1. Saves in flight are finished, before Python lets its pools of threads go: a file system that
   resolves a name in one could reach no server any more.
2. When `multiprocessing` ends the process, the saves that were begun since, by threads that Python
   waits for, are finished too, and all is let go.
3. A failure that nobody waited for is told on standard error, and the exit status is not 0.
4. Then, and not before, storage closes its connections (`dist_ckpt.storage.s3_client`).

A forked child has none of its parent's saves: it neither waits for them nor ends them. It has all
of this for its own.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  see `_finish_first`
import inspect
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from typing import Any, Protocol

from dist_ckpt.errors import describe
from dist_ckpt.ranks.job import Job
from dist_ckpt.saving.handle import SaveHandle, note_untold, take_untold, untold_number
from dist_ckpt.threads import Bell, Latch, start

# The background threads of a rank: one writes, and on rank 0 another tidies up.


_NICE = 10
"""How much later than the training this is served by the processors, as `nice` counts."""


_changed = Bell()
# Threads that run a job or let go of what it held. Not those that were left to themselves.
_at_work: set[threading.Thread] = set()


def wait_for_threads(seconds: float) -> bool:
    """Wait until no background thread has anything in its hands; return whether that is so.

    A daemon that lets go of a tensor while the interpreter goes ends the process by an abort: torch
    asks for the interpreter in a destructor, which must not be left by an exception.
    """
    return _changed.wait_for(lambda: not _at_work, seconds)


os.register_at_fork(after_in_child=_at_work.clear)


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
        self._idle = Latch()
        self._idle.open()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the background, after those before it; it must not raise."""
        # Not alive: a listener or a backend ended it with SystemExit, or this process was forked.
        if self._jobs is None or self._thread is None or not self._thread.is_alive():
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name=self._name, daemon=True
            )
            start(self._thread)
            # The thread knows the queue alone, so it ends with an owner that forgot to stop it.
            weakref.finalize(self, self._jobs.put, None).atexit = False
        # Of this job alone: one that was given up must not make the next one look finished.
        idle = self._idle = Latch()

        def run() -> None:
            try:
                job()
            finally:
                idle.open()

        self._jobs.put(run)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no job runs or waits; return whether that is so."""
        return self._idle.wait(timeout)

    def abandon(self) -> None:
        """Leave a job that does not come back; the next one gets a thread of its own."""
        self.stop()
        _at_work.difference_update([self._thread] if self._thread else [])
        _changed.ring()
        self._idle = Latch()
        self._idle.open()

    def stop(self) -> None:
        """Let the thread end when its jobs are done."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    _yield_to_training()
    me = threading.current_thread()
    while (job := jobs.get()) is not None:
        _at_work.add(me)
        try:
            job()
        finally:
            del job  # else it, and all that it looks at, would live until the next one
            _at_work.discard(me)
            _changed.ring()


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


_PATIENCE_SECONDS = 2.0
"""How long the end waits without a word: most saves are over by then."""

# What a signal raises in the main thread, by Python's handler or by one as programs have it.
_INSISTENCE = (KeyboardInterrupt, SystemExit)


class Closing(Protocol):
    """What has to be closed before the process goes."""

    @property
    def in_flight(self) -> SaveHandle | None:
        """The save that is not over yet, and was not given up."""
        ...

    @property
    def label(self) -> str:
        """The save in flight, as messages name it."""
        ...

    @property
    def job(self) -> Job:
        """The ranks that save, and the run."""
        ...

    def close(self) -> None:
        """Finish the save in flight, and let all go."""
        ...

    def give_up(self) -> None:
        """Cancel the save in flight."""
        ...


_open: weakref.WeakSet[Closing] = weakref.WeakSet()
_registered_in: int | None = None

os.register_at_fork(after_in_child=_open.clear)


def end_with(saver: Closing) -> None:
    """Let this process not end before the save that `saver` begins now is over."""
    global _registered_in
    _open.add(saver)
    if _registered_in != os.getpid():
        _registered_in = os.getpid()
        # Not atexit, which the processes of multiprocessing, and so torch's spawn, never come to.
        Finalize(None, close_all, exitpriority=10)


def end_without(saver: Closing) -> None:
    """Forget `saver`: it was closed."""
    _open.discard(saver)


def finish_before(job: Job, *, besides: Closing | None = None) -> None:
    """Wait for what others in this process save to a run, before `job` takes it over or loads.

    A claim that is taken now would end such a save, and nobody meant that: a cell of a notebook
    that is run twice, or `async_save` in a loop, goes on with what this very process does. And a
    load means what was saved before it, in the background or not. The failure of a save is told to
    whoever waits for it, or at the end. One of other ranks is not waited for: they may be gone, and
    be the reason to begin anew without them.

    Args:
        job: what begins.
        besides: who asks.
    """
    if threading.current_thread() in _at_work:
        return  # called by such a save, as a listener is: it would wait for itself
    for saver in list(_open):
        alike = saver.job.url == job.url and saver.job.ranks == job.ranks
        if alike and saver is not besides:
            _wait_for(saver)


def leave(saver: Closing, close: Callable[[], None], error: BaseException | None) -> None:
    """Call `close` at the end of a `with` block, which `error` ends if it is one.

    Raises:
        Exception: what `close` raised; where `error` ends the block that is a note to it.
    """
    try:
        if error is not None:
            _say_waiting(saver)  # in here: who reads it may interrupt before the waiting begins
        close()
    except KeyboardInterrupt:
        if isinstance(error, KeyboardInterrupt):
            saver.give_up()  # asked once more: nobody waits for the save any longer
        raise
    except Exception as failure:
        if error is None:
            raise
        # The exception that ended the loop is the news; the failed save is a note to it.
        error.add_note(f"besides, the save in flight failed: {describe(failure)}")


def _say_waiting(saver: Closing) -> None:
    """Say on standard error what is waited for, if anything is, and how to give that up."""
    handle = saver.in_flight
    if handle is not None:
        _say(f"{_waiting(saver, handle)}; interrupt it to give that up")


def _waiting(saver: Closing, handle: SaveHandle) -> str:
    now = handle.progress
    done = f", {now.nbytes_done:,} of {now.nbytes_total:,} bytes" if now.nbytes_total else ""
    return f"waiting for {saver.label} ({now.phase}{done})"


def _say(text: str) -> None:
    # Not by the log, which may go anywhere: this is for the person at the terminal.
    with suppress(Exception):  # there may be no such stream, or nobody at its other end
        sys.stderr.write(f"dist_ckpt: {text}\n")
        sys.stderr.flush()


def _finish_all() -> None:
    """Wait for the saves in flight; who interrupts that twice, whenever, has them given up."""
    interrupted = isinstance(_last_error(), KeyboardInterrupt)
    for saver in list(_open):
        said = False
        while saver.in_flight is not None:
            try:
                if interrupted and not said:
                    said = True
                    _say_waiting(saver)
                _wait_for(saver)
            except _INSISTENCE:
                if interrupted:
                    # Asked to end, and asked again: nobody waits for a checkpoint any more. Given
                    # up on every rank and not just left, so that none waits for this one's report.
                    with suppress(*_INSISTENCE):
                        saver.give_up()
                    break
                interrupted = True


def _wait_for(saver: Closing) -> None:
    handle = saver.in_flight
    if handle is not None and not handle.settle(_PATIENCE_SECONDS):
        _say(_waiting(saver, handle))
        handle.settle()


def close_all() -> None:
    """Finish every save, close every saver and tell what nobody heard of, as the end does."""
    _finish_all()
    for saver in list(_open):
        label = saver.label
        try:
            saver.close()
        except _INSISTENCE:
            break  # what is left of it are threads and memory, which go anyway
        except Exception as error:
            text = f"{label} failed, and nobody waited for it: {describe(error)}"
            note_untold(untold_number(), text)
    # The last thing that a save lets go of, and not only its outcome.
    wait_for_threads(_PATIENCE_SECONDS)
    _tell()


def _finish_first() -> None:
    """Do the first step, as early as Python lets anything be done at its end.

    Registered after the pools of threads have registered their own end, so called before that.
    """
    _finish_all()
    if parent_process() is not None:
        # Its exit status is made up next, before what multiprocessing would call afterwards.
        _tell()


def _tell() -> None:
    """Tell what nobody was told, and let the process fail."""
    for text in take_untold():
        _say(text)
        if not isinstance(sys.stderr, _FailingStream):
            sys.stderr = _FailingStream(sys.stderr)


class _FailingStream:
    """Standard error, but for the last flush of the process, which fails.

    That is the one thing after which both Python (with 120) and `multiprocessing` (with 1) end with
    an exit status other than 0 when everything else is over: an exception at exit is only printed,
    and to end the process here would cut off whatever is still to be called at its end.
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        """Flush, and fail if this is the last time."""
        if self._stream is not None:
            self._stream.flush()
        frame = inspect.currentframe()
        caller = frame.f_back.f_code.co_name if frame is not None and frame.f_back else ""
        if sys.is_finalizing() or caller == "_flush_std_streams":
            raise SystemExit(1)


def _last_error() -> BaseException | None:
    """Return what ended the program, where that was an exception that nobody caught."""
    return getattr(sys, "last_value", None)


# Not public, but what the pools of threads themselves use; without it, or where the process ends
# already, the second step does what this one would have done.
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_finish_first)  # type: ignore[attr-defined]  # noqa: SLF001
