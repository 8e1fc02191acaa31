"""Run a function on several ranks: real processes, a real gloo group, no ports.

`run_ranks(4, work, arg)` calls `work(arg)` in four processes that have joined one process group
and returns the four results; `@ranks(4)` makes a test function run that way. Ranks are forked
from a server that has imported torch already, so one starts in tens of milliseconds.

Nothing hangs: a rank that overruns is made to dump the stacks of its threads and is killed, and
the error names it. A rank that raises, exits, dies by a signal, or loses a thread to an exception
fails the call, with its traceback. As with all of multiprocessing, a script that calls this does
so under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import ParamSpec, TypeVar, cast, overload

from dist_ckpt.errors import CoordinationError, ErrorKind, UsageError, describe
from dist_ckpt.testing.rank_process import BARRIER, LEAVE, Outcome, RankJob, run_rank

R = TypeVar("R")
P = ParamSpec("P")

PRELOAD = (
    "hypothesis",
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",  # which the first optimizer of a process imports: half a second for each rank
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "dist_ckpt.checkpointer",
    "dist_ckpt.functional",
    "dist_ckpt.testing.rank_process",
)
"""Imported once by the server; what is not installed is passed over."""
# After the first failure the others get this long to report theirs: they often have the cause.
_GRACE_SECONDS = 10.0
EXIT_SECONDS = 20.0
"""How long a rank may take to end."""


@dataclass(slots=True)
class _Rank:
    """One rank as its caller sees it."""

    job: RankJob
    process: ForkServerProcess
    pipe: Connection
    outcome: Outcome | None = None

    def trace(self) -> str:
        return self.job.trace.read_text(errors="replace") if self.job.trace.exists() else ""


@overload
def run_ranks(
    n: int, fn: Callable[..., R], *args: object, timeout_seconds: float = 300.0
) -> list[R]: ...


@overload
def run_ranks(
    n: int,
    fn: Callable[..., R],
    *args: object,
    timeout_seconds: float = 300.0,
    expect_killed: Collection[int],
) -> list[R | None]: ...


def run_ranks(
    n: int,
    fn: Callable[..., R],
    *args: object,
    timeout_seconds: float = 300.0,
    expect_killed: Collection[int] = (),
) -> Sequence[R | None]:
    """Call `fn(*args)` on `n` ranks of one gloo process group and return the results by rank.

    Each rank is a process of its own with one torch thread, the environment and the working
    directory of the caller, and `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE` set.

    Args:
        n: the world size.
        fn: a function at the top level of an importable module.
        args: values that pickle: plain values, arrays, CPU tensors. So must the result.
        timeout_seconds: how long all ranks together may take, their start included.
        expect_killed: the ranks that a signal must end before they return. Their result is
            `None`, and no rank waits for another at the end.

    Raises:
        CoordinationError: some ranks failed, were killed, or overran, with the causes in `ranks`;
            or they could not be started.
        UsageError: `fn` is no importable function, or an argument does not pickle.
    """
    call = _encode_call(fn, args, {})
    results = _run(n, call, timeout_seconds=timeout_seconds, expect_killed=expect_killed)
    return cast("list[R | None]", results)


def ranks(
    n: int, *, timeout_seconds: float = 300.0
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a test function run on each of `n` ranks, as `run_ranks` does.

    Its parameters and fixtures are passed on to every rank, so they must pickle.
    """

    def decorate(fn: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(fn)
        def on_ranks(*args: P.args, **kwargs: P.kwargs) -> None:
            _run(n, _encode_call(fn, args, kwargs), timeout_seconds=timeout_seconds)

        # In its module the name of `fn` now means `on_ranks`: this leads a rank back to `fn`.
        on_ranks.__dict__["rank_body"] = fn
        return on_ranks

    return decorate


def _encode_call(
    fn: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> bytes:
    module = getattr(fn, "__module__", "")
    name = getattr(fn, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None)
    if found is None or getattr(found, "rank_body", found) is not fn:
        raise UsageError(f"{fn!r} must be a function at the top level of an importable module")
    try:
        # Not multiprocessing's pickler: that one passes tensors as shared memory, which ends
        # with the process that made it.
        return pickle.dumps((module, name, tuple(args), dict(kwargs)))
    except Exception as error:  # a foreign __reduce__ may do anything
        raise UsageError(f"an argument of {name} does not pickle: {describe(error)}") from error


def _run(
    n: int, call: bytes, *, timeout_seconds: float, expect_killed: Collection[int] = ()
) -> list[object]:
    if n < 1:
        raise UsageError(f"n is {n}: at least one rank is needed")
    deadline = time.monotonic() + timeout_seconds
    started: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="dist_ckpt-ranks-") as folder:
        try:
            for rank in range(n):
                job = RankJob(rank, n, folder, timeout_seconds, dict(os.environ), call)
                # One by one: should one not start, those before it are stopped below.
                started.append(_start(job))
            _collect(started, deadline, expect_killed)
            _release(started, expect_killed)
        finally:
            _stop(started)
    outcomes = [each.outcome or Outcome(cause="never started") for each in started]
    _check(outcomes, expect_killed)
    return [outcome.result for outcome in outcomes]


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _start(job: RankJob) -> _Rank:
    ours, theirs = _context().Pipe()
    process = _context().Process(target=run_rank, args=(job, theirs), name=f"rank-{job.rank}")
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise CoordinationError(
            "the server that forks the ranks ended: its error output has the cause"
        ) from error
    theirs.close()  # so that the death of the rank is the end of the pipe
    return _Rank(job, process, ours)


def _collect(started: Sequence[_Rank], deadline: float, expect_killed: Collection[int]) -> None:
    """Wait until every rank has an outcome, or the deadline, or a while after a failure."""
    pending: dict[object, _Rank] = {each.pipe: each for each in started}
    while pending:
        timeout = max(0.0, deadline - time.monotonic())
        ready = wait([each.pipe for each in pending.values()], timeout)
        if not ready:
            return
        for pipe in ready:
            each = pending.pop(pipe)
            each.outcome = outcome = _receive(each)
            if outcome.cause and not (outcome.killed and each.job.rank in expect_killed):
                # Its connections close with it, which wakes the peers that wait for it.
                _tell(each, LEAVE)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)


def _receive(each: _Rank) -> Outcome:
    try:
        return cast("Outcome", pickle.loads(each.pipe.recv_bytes()))
    except (EOFError, OSError):
        each.process.join(EXIT_SECONDS)
        code = each.process.exitcode
        return Outcome(
            cause=_describe_exit(code), details=each.trace(), killed=code is not None and code < 0
        )


def _release(started: Sequence[_Rank], expect_killed: Collection[int]) -> None:
    """Let the ranks that have an outcome end, and judge how they do it."""
    # Only where all came through: a barrier without one of them would never end.
    whole = not expect_killed and all(each.outcome and not each.outcome.cause for each in started)
    for each in started:
        if each.outcome and not each.outcome.cause:
            _tell(each, BARRIER if whole else LEAVE)
    deadline = time.monotonic() + EXIT_SECONDS
    for each in started:
        if each.outcome:
            each.process.join(max(0.0, deadline - time.monotonic()))
            if not each.outcome.cause and each.process.exitcode != 0:
                cause = f"returned, then {_describe_exit(each.process.exitcode)}"
                each.outcome = Outcome(cause=cause, details=each.trace())


def _tell(each: _Rank, word: bytes) -> None:
    with suppress(OSError):  # it is gone: its exit status tells
        each.pipe.send_bytes(word)


def _stop(started: Sequence[_Rank]) -> None:
    """End every rank that still runs, the stacks of its threads first."""
    running = [each for each in started if each.process.is_alive()]
    for each in running:
        os.kill(each.process.pid or 0, signal.SIGABRT)  # its faulthandler dumps, then it dies
    for each in running:
        each.process.join(EXIT_SECONDS)
        # The dump itself may hang.
        each.process.kill()
        each.process.join()
        sys.stderr.write(f"rank {each.job.rank} was stopped here:\n{each.trace()}\n")
    for each in started:
        each.outcome = each.outcome or Outcome(
            cause="did not finish in time and was stopped", details=each.trace(), timed_out=True
        )
        each.pipe.close()
        each.process.close()


def _check(outcomes: Sequence[Outcome], expect_killed: Collection[int]) -> None:
    failed = {
        rank: outcome
        for rank, outcome in enumerate(outcomes)
        if outcome.cause and not (outcome.killed and rank in expect_killed)
    }
    for rank in expect_killed:
        if not outcomes[rank].cause:
            failed[rank] = Outcome(cause="returned, though a signal was to end it")
    if failed:
        late = all(outcome.timed_out for outcome in failed.values())
        causes = {rank: outcome.cause for rank, outcome in sorted(failed.items())}
        blocks = [f"rank {rank}: {causes[rank]}\n{failed[rank].details}" for rank in causes]
        raise CoordinationError(
            "\n".join([f"{len(failed)} of {len(outcomes)} ranks failed", *blocks]),
            kind=ErrorKind.TIMEOUT if late else ErrorKind.PEER_FAILED,
            ranks=causes,
        )


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "did not exit: does one of its threads still run?"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"
