"""What happens inside a rank that `dist_ckpt.testing.ranks` started.

A rank joins the process group, calls the function, sends back one `Outcome`, and waits to be told
how to leave. Crashes and hangs leave the stacks of all threads in the rank's trace file.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import resource
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from dist_ckpt.errors import describe

BARRIER = b"barrier"
LEAVE = b"leave"
# Past its deadline a rank is ended by its caller; this much later it ends by itself.
_ORPHAN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RankJob:
    """What a rank needs to know; `call` is the pickled (module, function, args, kwargs)."""

    rank: int
    world_size: int
    folder: str
    timeout_seconds: float
    environment: dict[str, str]
    call: bytes

    @property
    def trace(self) -> Path:
        """The file that receives the stacks of this rank when it crashes or is stopped."""
        return Path(self.folder) / f"rank-{self.rank}.trace"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank ended: with a result, or with a cause in one line and its details."""

    result: object = None
    cause: str = ""
    details: str = ""
    killed: bool = False
    timed_out: bool = False


def run_rank(job: RankJob, pipe: Connection) -> None:
    """Be one rank from start to end: the target of its process."""
    _prepare(job)
    thread_failures = _watch_threads()
    outcome = _call(job, thread_failures)
    pipe.send_bytes(_encode(outcome))
    if _await_release(pipe) != BARRIER:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    # A rank that leaves while a peer still finishes a collective makes that peer abort.
    dist.barrier()
    dist.destroy_process_group()


def _prepare(job: RankJob) -> None:
    # Open until the process is gone: the exit itself may crash or hang.
    trace_fd = os.open(job.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.enable(file=trace_fd, all_threads=True)
    # Should the caller be killed, nobody else would end this process.
    faulthandler.dump_traceback_later(
        job.timeout_seconds + _ORPHAN_SECONDS, exit=True, file=trace_fd
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The server that forked this process has the environment of the first call, not of this one.
    os.environ.clear()
    os.environ.update(
        job.environment,
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    # c10d asks the resolver for the name of every peer, for its log: without a name server in
    # reach each question would cost 5 s.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    torch.set_num_threads(1)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _watch_threads() -> list[str]:
    """Return a list that receives the traceback of every thread that an exception ends."""
    failures: list[str] = []

    def hook(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        failures.append(f"thread {name}:\n{''.join(lines)}")

    threading.excepthook = hook
    return failures


def _call(job: RankJob, thread_failures: Sequence[str]) -> Outcome:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.folder}/rendezvous",
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout_seconds),
        )
        module, name, args, kwargs = pickle.loads(job.call)
        fn = getattr(importlib.import_module(module), name)
        result = getattr(fn, "rank_body", fn)(*args, **kwargs)
    except BaseException as error:
        # SystemExit and pytest's own outcomes are not `Exception`, and end a test all the same.
        return Outcome(cause=describe(error), details=traceback.format_exc())
    if thread_failures:
        return Outcome(cause="a thread ended by an exception", details="\n".join(thread_failures))
    return Outcome(result=result)


def _encode(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # a foreign __reduce__ may do anything
        cause = f"the result does not pickle: {describe(error)}"
        return pickle.dumps(Outcome(cause=cause, details=traceback.format_exc()))


def _await_release(pipe: Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError):  # the caller is gone
        return LEAVE
