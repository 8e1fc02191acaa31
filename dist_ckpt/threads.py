"""Threads of this process: waits that no interrupt breaks, work shared out, and work behind it.

Python's own ways of waiting break when the handler of a signal raises inside of them, as Ctrl-C
does in the main thread. `threading.Condition`, and with it `Event`, `Semaphore` and
`Future.result`, keep a lock for ever, on which the other side then hangs, or raise `RuntimeError`
instead: 10 and 3 of 1,000 interrupted waits of CPython 3.11. `Thread.join` takes a running thread
for ended from then on. Here a thread that waits holds nothing that anybody else needs: it sleeps on
a lock of its own.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from typing import Generic, Protocol, TypeVar

_T = TypeVar("_T")
ItemT = TypeVar("ItemT")
HalfT = TypeVar("HalfT")
ResultT = TypeVar("ResultT")

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
            # First: an interrupt may come when the thread runs already, and is to be waited for.
            self._is_asked = True
            start(self._thread)
        except BaseException:
            # Whoever is first decides: the thread that it works, or this that it never will.
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


# Work shared out over threads that end before the caller goes on, whatever happens.


_MOST_THREADS = 16
_ITEMS_A_THREAD = 8


def threads_for(count: int) -> int:
    """Return in how many threads to make so many small requests: a few make none worthwhile."""
    return min(_MOST_THREADS, 1 + count // _ITEMS_A_THREAD)


def in_parallel(work: Callable[[ItemT], None], items: Iterable[ItemT], *, threads: int) -> None:
    """Call `work` on each of `items`, in up to `threads` threads, of which this one is the first.

    Items are taken in their order, one at a time, so `items` may be a generator. No thread of this
    runs any more when it returns or raises: what the work uses may then be closed.

    The threads are made here and not kept: a pool would not survive a fork, would have to be
    closed, and takes no more work while the interpreter ends, which is when last saves are written.

    Raises:
        BaseException: the first failure of any call; what was not begun by then is left out.
    """
    _run(_Items(work, items), threads)


def map_in_parallel(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, threads: int
) -> list[ResultT]:
    """Return what `work` returns for each of `items`, in their order; see `in_parallel`."""
    results: dict[int, ResultT] = {}

    def one(numbered: tuple[int, ItemT]) -> None:
        results[numbered[0]] = work(numbered[1])

    in_parallel(one, enumerate(items), threads=threads)
    return [results[number] for number in sorted(results)]


def in_two_steps(
    first: Callable[[ItemT], HalfT],
    second: Callable[[HalfT], None],
    items: Iterable[ItemT],
    *,
    firsts: int,
    seconds: int,
    under_way: int,
) -> None:
    """Call `first` on each of `items` and `second` on what it returned, several of each at once.

    First steps are those that wait, for a disk or a network, and second ones those that compute.
    A thread goes on with a first step wherever one may begin, so the disk has its next request
    before anybody computes, and without waiting for another thread to wake up.

    Threads and failures are those of `in_parallel`.

    Args:
        first: what is done with an item in any order.
        second: what is done with its result, in another thread as it may be.
        items: taken in their order, one at a time.
        firsts: how many first steps run at once, at most.
        seconds: how many second steps run at once, at most.
        under_way: how many items may be begun and not done, at most: what memory there is for.
    """
    steps = Steps(first, second, items, firsts, seconds, under_way)
    _run(steps, min(firsts + seconds, under_way))


class _Jobs(Protocol):
    """Whose jobs several threads do until there are no more."""

    def next(self) -> Callable[[], None] | None:
        """Return what this thread is to do next, None when there is nothing left for it."""

    def stop(self) -> None:
        """Give out no more."""


def _run(jobs: _Jobs, threads: int) -> None:
    crew = _Crew(jobs)
    helpers: list[threading.Thread] = []
    interrupt: BaseException | None = None
    try:
        for _ in range(threads - 1):
            # A daemon: one whose start is interrupted may never begin, nor end.
            helper = threading.Thread(target=crew.help, name="dist_ckpt-io", daemon=True)
            try:
                start(helper)
            except RuntimeError:
                break  # no more threads can be had: those there are do it, in more time
            helpers.append(helper)
        crew.work()
    finally:
        # After an interrupt too: the threads still use what the caller is about to close. The loop
        # is here because an interrupt may come before the first line of what is called.
        while True:
            try:
                crew.dismiss()
                break
            except BaseException as error:
                interrupt = error
        for helper in helpers:
            helper.join()
    if interrupt is not None:
        raise interrupt
    if crew.failures:
        raise crew.failures[0]


class _Crew:
    """The threads that do `jobs`.

    They count themselves: after an interrupt while one is started or joined, nobody else can say
    whether it runs.
    """

    def __init__(self, jobs: _Jobs) -> None:
        self.failures: list[BaseException] = []
        self._jobs = jobs
        self._lock = threading.Lock()
        self._dismissed = False
        self._at_work: set[object] = set()
        self._someone_left = Bell()

    def help(self) -> None:
        """Work, unless all is over already."""
        me = object()
        with self._lock:
            if self._dismissed:
                return
            self._at_work.add(me)
        self.work()
        self._at_work.discard(me)
        self._someone_left.ring()

    def work(self) -> None:
        """Do jobs until there are no more, or one fails."""
        try:
            while job := self._jobs.next():
                job()
        except BaseException as error:
            # Kept for the caller: a thread that fails unheard would make half a file a success.
            self.failures.append(error)
            self._jobs.stop()

    def dismiss(self) -> None:
        """Let nobody begin any more, and wait until nobody is at work.

        Raises:
            BaseException: an interrupt; somebody may be at work.
        """
        with self._lock:
            self._dismissed = True
        self._jobs.stop()
        self._someone_left.wait_for(lambda: not self._at_work)


class _Items(Generic[ItemT]):
    """One job for each item."""

    def __init__(self, work: Callable[[ItemT], None], items: Iterable[ItemT]) -> None:
        self._work = work
        self._items = iter(items)
        self._lock = threading.Lock()
        self._stopped = False

    def next(self) -> Callable[[], None] | None:
        # A generator cannot be resumed by two threads at once.
        with self._lock:
            if not self._stopped:
                for item in self._items:
                    return partial(self._work, item)
        return None

    def stop(self) -> None:
        self._stopped = True


class Steps(Generic[ItemT, HalfT]):
    """Two jobs for each item, one after the other; see `in_two_steps`.

    Args:
        first: makes the first step of an item.
        second: makes the second one, of what the first returned.
        items: what for.
        firsts: how many first steps may go on at once.
        seconds: how many second ones.
        under_way: how many items may be begun and not done.
    """

    def __init__(
        self,
        first: Callable[[ItemT], HalfT],
        second: Callable[[HalfT], None],
        items: Iterable[ItemT],
        firsts: int,
        seconds: int,
        under_way: int,
    ) -> None:
        self._first = first
        self._second = second
        self._items = iter(items)
        self._most_firsts = firsts
        self._most_seconds = seconds
        self._most_under_way = under_way
        self._firsts = self._seconds = self._under_way = 0
        self._halves: deque[HalfT] = deque()
        self._stopped = False
        self._lock = threading.Lock()
        self._changed = Bell()

    def next(self) -> Callable[[], None] | None:
        """Return the next job as soon as there is one, None when there are no more."""
        found = self._changed.wait_for(self._look)
        return found[0] if found else None

    def stop(self) -> None:
        """Have no more jobs begun."""
        self._stopped = True
        self._changed.ring()

    def _look(self) -> tuple[()] | tuple[Callable[[], None] | None]:
        """Return the next job, None in its place for no more, nothing to look again later."""
        with self._lock:
            if self._stopped:
                return (None,)
            if self._firsts < self._most_firsts and self._under_way < self._most_under_way:
                for item in self._items:
                    self._firsts += 1
                    self._under_way += 1
                    return (partial(self._do_first, item),)
            if self._halves and self._seconds < self._most_seconds:
                self._seconds += 1
                return (partial(self._do_second, self._halves.popleft()),)
            # As long as an item is under way its second step may still come.
            return () if self._under_way else (None,)

    def _do_first(self, item: ItemT) -> None:
        half = self._first(item)
        with self._lock:
            self._firsts -= 1
            self._halves.append(half)
        self._changed.ring()

    def _do_second(self, half: HalfT) -> None:
        self._second(half)
        with self._lock:
            self._seconds -= 1
            self._under_way -= 1
        self._changed.ring()


def ahead(
    make: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, count: int
) -> Generator[ResultT, None, None]:
    """Yield `make(item)` for each of `items`, in their order, and make the next ones meanwhile.

    Each is made in a thread of its own, or in this one where no more threads can be had. None is
    being made any more when the iteration is over, closed or failed.

    Args:
        make: called in any thread.
        items: taken by the thread that asks for a result.
        count: how many results are begun, at most, while another one is used.

    Raises:
        BaseException: what `make` raised, in the place of its result.
    """
    begun: deque[Making[ResultT]] = deque()
    try:
        for item in items:
            begun.append(Making(partial(make, item)))
            if len(begun) > count:
                begun[0].wait()  # an interrupt leaves it among those that the end waits for
                yield begun.popleft().take()
        while begun:
            begun[0].wait()
            yield begun.popleft().take()
    finally:
        # What they read from may be closed after this.
        for made in begun:
            made.wait()


class Making(Generic[ResultT]):
    """A result in the making: on a thread of its own, or at once where no more can be had."""

    def __init__(
        self, make: Callable[[], ResultT], then: Callable[[], None] = lambda: None
    ) -> None:
        """Begin.

        Args:
            make: called in any thread.
            then: called there when it is over.
        """
        self._make = make
        self._then = then
        # Taken out by single operations: by whoever takes the result, or whoever lets it go.
        self._results: list[ResultT] = []
        self._letting_go: list[Callable[[ResultT], None]] = []
        self._error: BaseException | None = None
        self.is_over = False
        # A daemon: a read that hangs in an outage must not keep the program from ending.
        self._worker = Worker(self._run, name="dist_ckpt-io", daemon=True)
        try:
            self._worker.start()
        except RuntimeError:  # no more threads can be had
            self._run()

    def wait(self) -> None:
        """Wait until nobody makes it any more."""
        self._worker.wait()

    def take(self) -> ResultT:
        """Return it, once, when nobody makes it any more."""
        if self._error is not None:
            raise self._error
        return self._results.pop()

    def give_up(self, let_go: Callable[[ResultT], None]) -> None:
        """Wait for it no more; call `let_go` with the result as soon as there is one."""
        self._letting_go.append(let_go)
        self._let_go()

    def _run(self) -> None:
        try:
            self._results.append(self._make())
        # A thread has nobody to raise to: who asks for the result is told.
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._let_go()
        self._then()

    def _let_go(self) -> None:
        for let_go in self._letting_go:
            try:
                result = self._results.pop()
            except IndexError:
                return  # there is none, or the other thread that is here has it
            let_go(result)


# The background threads of a rank: one writes, and on rank 0 another tidies up.


_NICE = 10
"""How much later than the training this is served by the processors, as `nice` counts."""

_changed = Bell()
# Threads that run a job or let go of what it held. Not those that were left to themselves.
_at_work: set[threading.Thread] = set()

os.register_at_fork(after_in_child=_at_work.clear)


def wait_for_threads(seconds: float) -> bool:
    """Wait until no background thread has anything in its hands; return whether that is so.

    A daemon that lets go of a tensor while the interpreter goes ends the process by an abort: torch
    asks for the interpreter in a destructor, which must not be left by an exception.
    """
    return _changed.wait_for(lambda: not _at_work, seconds)


def is_background() -> bool:
    """Whether this thread is one of those."""
    return threading.current_thread() in _at_work


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
                target=_run_jobs, args=(self._jobs,), name=self._name, daemon=True
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
        # Nor does the end of the process wait for it: it may never come back.
        _at_work.difference_update([self._thread] if self._thread else [])
        _changed.ring()
        self._idle = Latch()
        self._idle.open()

    def stop(self) -> None:
        """Let the thread end when its jobs are done."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _run_jobs(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
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
            # Not below what it is, which takes a right that few have.
            nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
