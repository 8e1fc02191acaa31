"""One event loop for each process, on a thread of its own, that works until the process is gone.

The loop of fsspec would do but for its helpers: once the main thread has ended, Python takes no
more work for pools of threads, and a save that is still going on then could reach no server.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

from dist_ckpt.waiting import Latch

_T = TypeVar("_T")
_P = ParamSpec("_P")

_WORKERS = 4

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}

# Held over a fork, so that the child never finds it locked by a thread that it does not have.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


def process_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop of this process; a child after a fork starts its own."""
    with _lock:
        found = _loops.get(os.getpid())
        if found is None:
            found = _loops[os.getpid()] = _start()
    return found


def _start() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # For names of hosts, certificates and digests: whatever would hold the loop up.
    loop.set_default_executor(_Workers(_WORKERS))
    threading.Thread(target=loop.run_forever, name="dist_ckpt-io", daemon=True).start()
    return loop


class OnLoop(Generic[_T]):
    """Work on the loop of this process, begun from another thread.

    Args:
        work: makes the coroutine, on the loop.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._outcome: list[_T] = []
        self._error: BaseException | None = None
        self._over = Latch()
        self._loop = process_loop()
        self._loop.call_soon_threadsafe(self._begin)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over, for at most `timeout` seconds; return whether it is."""
        return self._over.wait(timeout)

    def result(self) -> _T:
        """Wait until it is over, and return what it returned or raise what it raised."""
        self.wait()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._outcome[0]
        finally:
            del error  # its traceback leads here: a cycle would keep the buffers that were sent

    def cancel(self) -> None:
        """Ask it to end by `asyncio.CancelledError`, wherever it waits."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._run())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self._outcome.append(await self._work())
        except BaseException as error:
            self._error = error
        finally:
            del self._work
            # Here, as Python loses an interrupt that comes while asyncio's record of it is kept.
            self._task = None
            self._over.open()


class _Workers(ThreadPoolExecutor):
    """A pool of daemon threads that all exist from the begin: at exit none can be started."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, name=f"dist_ckpt-io-{number}", daemon=True).start()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run `fn` on one of the threads."""
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        while True:
            self._jobs.get()()
