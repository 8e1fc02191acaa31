"""Requests to S3: one client a process, made by s3fs, and how requests are repeated.

They run on an event loop of our own, below. That of fsspec would do but for its helpers: once the
main thread has ended, Python takes no more work for pools of threads, and a save that is still
going on then could reach no server.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache, partial
from multiprocessing.util import Finalize
from typing import Any, Generic, ParamSpec, TypeVar

import s3fs
from aiobotocore.session import AioSession
from botocore.loaders import Loader, create_loader
from s3fs.utils import ParamKwargsHelper

from dist_ckpt.errors import CheckpointError, UsageError, describe
from dist_ckpt.storage.limit import AdaptiveLimit
from dist_ckpt.storage.retry import Backoff
from dist_ckpt.storage.s3_errors import FOREIGN, Verdict, judge
from dist_ckpt.threads import Latch

_T = TypeVar("_T")

_CLOSE_SECONDS = 5.0
# What botocore itself waits for an answer when it is not told otherwise.
_STALL_SECONDS = 60.0

Answer = dict[str, Any]
"""What the server answered, as botocore parses it."""


class Client:
    """Runs requests on the event loop of the process, for threads that wait for them.

    After a fork the child gets a loop, a file system and connections of its own.

    Args:
        options: for `s3fs.S3FileSystem`. Its `max_concurrency` is the most requests at once;
            `config_kwargs` may hold `connect_timeout` and `read_timeout` in seconds, the latter
            being how long nothing may move, and `retries={"total_max_attempts": ...}`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        config = dict(options.get("config_kwargs") or {})
        retries = dict(config.pop("retries", None) or {})
        # botocore counts the first request in `total_max_attempts` and not in `max_attempts`.
        attempts = retries.get("total_max_attempts", retries.get("max_attempts", -1) + 1)
        self.backoff = Backoff(attempts=attempts) if attempts else Backoff()
        self.stall_seconds = float(config.get("read_timeout", _STALL_SECONDS))
        self.concurrency = int(options.get("max_concurrency", 10))
        # Asked for explicitly, this says that the server takes no checksums that it need not.
        self.checksums = config.get("request_checksum_calculation") != "when_required"
        # Learned from the server, and true for every process that asks it.
        self._deletes_many = True
        self._options = {**options, "config_kwargs": self._config(config)}
        self._sessions: dict[int, Session] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process makes its own connections.
        return {**self.__dict__, "_sessions": {}}

    @property
    def retries(self) -> int:
        """How many requests of this process were repetitions."""
        return self.session().retries

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run `work()` on the loop and wait for its result."""
        running = OnLoop(work)
        try:
            return running.result()
        except BaseException:
            # An interrupted caller gets its buffers back only when no request sends them any more.
            running.cancel()
            running.wait(_CLOSE_SECONDS)
            raise

    async def call(self, name: str, **parameters: Any) -> Answer:
        """Make the request `name` with these parameters, and repeat it where that may help."""
        return await self.repeat(lambda: self.once(name, parameters))

    async def once(
        self, name: str, parameters: Mapping[str, Any], *, patience: float = 1.0
    ) -> Answer:
        """Make one request, once.

        Args:
            name: of the method of the client.
            parameters: those of the method; the user's additional ones join them.
            patience: how many times `stall_seconds` the answer may take.
        """
        async with asyncio.timeout(self.stall_seconds * patience):
            return await self.send(name, parameters)

    async def send(self, name: str, parameters: Mapping[str, Any]) -> Answer:
        """Make one request without a deadline of its own, for those that watch its progress."""
        session = self.session()
        client, extra = await session.connected(parameters.get("Bucket"), name)
        answer: Answer = await getattr(client, name)(**{**extra, **parameters})
        return answer

    async def repeat(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Run `attempt` until it succeeds, fails for good, or was tried often enough.

        Raises:
            Exception: what the last attempt raised, as it was.
        """
        session = self.session()
        began = time.monotonic()
        failures = 0
        while True:
            # Noted before: of many that meet the same expired credentials one connects anew.
            connection = session.connection
            try:
                # Left before the pause below, so that another request has the place meanwhile.
                async with session.gate:
                    result = await attempt()
            except CheckpointError:
                raise
            except FOREIGN as error:
                verdict = judge(error)
                failures += 1
                if verdict is Verdict.FINAL:
                    raise
                if not self.backoff.allows(failures, time.monotonic() - began):
                    raise
                if verdict is Verdict.SLOW_DOWN:
                    session.gate.limit.throttled(time.monotonic())
                elif verdict is Verdict.EXPIRED:
                    await session.renew(connection)
            else:
                session.gate.limit.succeeded()
                return result
            session.retries += 1
            await asyncio.sleep(self.backoff.delay(failures, random.random()))

    async def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete up to a thousand objects, by one request where the server knows that.

        Servers do not agree about the digest that such a request needs. Why one of the objects
        cannot be deleted, its own request tells.
        """
        left = set(keys)
        if len(left) > 1 and self._deletes_many:
            wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            try:
                answer = await self.call("delete_objects", Bucket=bucket, Delete=wanted)
                left = {found.get("Key", "") for found in answer.get("Errors", ())}
            except FOREIGN as error:
                if judge(error) is not Verdict.FINAL:
                    raise
                self._deletes_many = False
        jobs = [
            partial(self.call, "delete_object", Bucket=bucket, Key=key)
            for key in keys
            if key in left
        ]
        await together(jobs, at_once=self.concurrency)

    def close(self) -> None:
        """Close the connections of this process."""
        session = self._sessions.pop(os.getpid(), None)
        if session is not None:
            session.close()

    def session(self) -> Session:
        """Return what this process has."""
        # `setdefault` is atomic, and needs no lock that a fork could leave locked for ever.
        pid = os.getpid()
        found = self._sessions.get(pid)
        if found is None:
            found = self._sessions.setdefault(pid, Session(self._options, self.concurrency))
        return found

    def _config(self, given: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {
            "connect_timeout": 10,
            "read_timeout": self.stall_seconds,
            "max_pool_connections": max(32, 2 * self.concurrency),
            # The CRC-32 that goes along is our own, computed off the event loop.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        # A signature over the body would be computed on the event loop, of every byte.
        signing = {"payload_signing_enabled": False, **(given.get("s3") or {})}
        # Repeated here, where a lost answer is told from a refusal, and nowhere below.
        once = {"total_max_attempts": 1, "mode": "standard"}
        return {**defaults, **given, "s3": signing, "retries": once}


class Gate:
    """Lets as many requests run at once as `limit` says at the moment."""

    def __init__(self, most: int) -> None:
        self.limit = AdaptiveLimit(most)
        self._running = 0
        # Belongs to a loop from its first use on, which is on ours; it may be made by any thread.
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._running < self.limit.limit)
            self._running += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._running -= 1
            self._changed.notify_all()


class Session:
    """What belongs to one process.

    Args:
        options: for `s3fs.S3FileSystem`.
        concurrency: the most requests at once.

    Attributes:
        gate: lets as many requests run as the server bears.
        retries: how many requests were repetitions.
        connection: how often it has connected.
        system: the file system of the connection, None before there is one.
        clients: those that are connected.
    """

    def __init__(self, options: Mapping[str, Any], concurrency: int) -> None:
        self.gate = Gate(concurrency)
        self.retries = 0
        self.connection = 0
        self._options = options
        self.system: Any = None
        self.clients: list[Any] = []
        self._lock = asyncio.Lock()
        # When nobody holds the store any more, or at the end of the process.
        self._pid = os.getpid()
        # Not by itself at exit, when a last save may still send: `_close_at_end` comes later.
        weakref.finalize(self, _close_clients, self.clients, self._pid).atexit = False
        _open_sessions.add(self)
        _close_at_end()

    def close(self) -> None:
        """Close the connections; a second time does nothing."""
        # What comes after all, from whoever is called later still, connects anew.
        self.system = None
        _close_clients(self.clients, self._pid)

    async def connected(self, bucket: str | None, name: str) -> tuple[Any, Mapping[str, Any]]:
        """Return the client, and the user's additional parameters of the method `name`."""
        async with self._lock:
            system = self.system or await self._connect()
        client = await system.get_s3(bucket)
        extra = ParamKwargsHelper(client).filter_dict(
            name, {**system.s3_additional_kwargs, **system.req_kw}
        )
        return client, extra

    async def renew(self, connection: int) -> None:
        """Connect anew, with the credentials that are found now, unless somebody did since."""
        async with self._lock:
            if connection == self.connection:
                await self._connect()

    async def _connect(self) -> Any:
        fixed = {"skip_instance_cache": True, "use_listings_cache": False, "asynchronous": True}
        try:
            system = s3fs.S3FileSystem(**{**self._options, **fixed})
            if system.session is None:
                system.session = _new_session(system.kwargs)
            self.clients.append(await system.set_session())
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"bad storage_options: {describe(error)}; correct them") from error
        self.system = system
        self.connection += 1
        return system


def _new_session(options: Mapping[str, Any]) -> AioSession:
    """Return what s3fs would make, but for the description of S3: a parsed one is shared.

    Everything else is its own, credentials above all: they are found anew for each connection.
    """
    session = AioSession(**options)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return session


@cache
def _loader(data_path: str | None) -> Loader:
    return create_loader(data_path)


_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_closed_in: int | None = None
# The last of all that multiprocessing calls at the end of a process, and far behind the saves that
# are finished there: whoever needs a connection has a higher priority.
_LAST = -1000


def _close_at_end() -> None:
    """Have the connections of this process closed when nothing needs them any more."""
    global _closed_in
    # By process: what the parent registered, multiprocessing does not call in a child.
    if _closed_in != os.getpid():
        _closed_in = os.getpid()
        Finalize(None, _close_sessions, exitpriority=_LAST)


def _close_sessions() -> None:
    for session in list(_open_sessions):
        session.close()


def _close_clients(clients: list[Any], pid: int) -> None:
    """Close the connections, unless this is a child that only inherited their memory."""
    if pid != os.getpid() or not clients:
        return

    async def close() -> None:
        while clients:
            await clients.pop().close()

    closing = OnLoop(close)
    if not _is_running_here(process_loop()):
        closing.wait(_CLOSE_SECONDS)


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread is that of the loop: garbage may be collected there too."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


@asynccontextmanager
async def stall_watch(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Yield a function to call on progress; `TimeoutError` once there is none for `seconds`."""
    loop = asyncio.get_running_loop()
    watching = True
    async with asyncio.timeout(seconds) as deadline:

        def progress() -> None:
            # A body may still be on its way when the answer has already come.
            if watching and not deadline.expired():
                deadline.reschedule(loop.time() + seconds)

        try:
            yield progress
        finally:
            watching = False


async def together(jobs: Iterable[Callable[[], Awaitable[_T]]], *, at_once: int) -> list[_T]:
    """Run `jobs`, so many at once, and return their results in order.

    Raises:
        Exception: the first failure, once every other job has ended.
    """
    # One iterator for all tasks: whichever is free takes the next job; a slow one delays none.
    pending = enumerate(jobs)
    results: dict[int, _T] = {}

    async def work() -> None:
        for number, job in pending:
            results[number] = await job()

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        # When this returns nothing may still send or fill what is the caller's again.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results[number] for number in range(len(results))]


# One event loop for each process, on a thread of its own, that works until the process is gone.


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
        # Kept here, because a loop refers to its tasks only weakly.
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
