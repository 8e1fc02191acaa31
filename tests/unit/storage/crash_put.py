"""Run by test_durable: puts one object again and again, killed one system call later each time.

Arguments: the folder to work in, the mode of the put, and `direct` where the object shall go past
the page cache in parallel, `linkless` where the file system shall know neither hard links nor a
rename that replaces nothing, else `buffered`. For each n a child works in the folder
`n`, which holds what `tests.unit.storage.test_durable` prepared there or nothing; the n-th call
of the child that reaches the file system is not made, the child being killed instead. Prints the
number of the first child that came to the end.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from dist_ckpt.storage import LocalStore, PutMode, disk

CALLS = ["mkdir", "open", "writev", "pwrite", "fsync", "link", "replace", "unlink", "close"]
CALLS += ["dup", "lstat", "rename"]
NEW = b"new " * 10_000 + b"bytes"


def go_direct() -> None:
    """Let `NEW` be taken for large: five pieces and a tail, by two writers."""
    disk.DIRECT_BYTES = 8192
    disk.__dict__["PIECE_BYTES"] = 8192


def go_linkless() -> None:
    """Let links fail as FAT does, and the C library know no better rename than POSIX has."""

    def link(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "no hard links", source)

    os.link = link  # type: ignore[assignment]
    disk.renameat2 = None


def crash_before(number: int) -> None:
    """Let the `number`-th of the calls kill this process."""
    counter = itertools.count(1)

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if next(counter) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    fcntl.flock = counted(fcntl.flock)  # type: ignore[assignment]
    fcntl.fcntl = counted(fcntl.fcntl)  # type: ignore[assignment]


def main(root: Path, mode: PutMode) -> None:
    """Fork one child for each call of a put, until one survives."""
    for number in itertools.count(1):
        store = LocalStore(root / str(number), single_writer=True)
        child = os.fork()
        if not child:
            crash_before(number)
            store.put("a/b/key", [memoryview(NEW)[:7], memoryview(NEW)[7:]], mode=mode)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            sys.stdout.write(f"{number}\n")
            return
        if not os.WIFSIGNALED(status):
            sys.exit(f"child {number} failed instead of being killed")


if __name__ == "__main__":
    if sys.argv[3] == "direct":
        go_direct()
    elif sys.argv[3] == "linkless":
        go_linkless()
    main(Path(sys.argv[1]), cast("PutMode", sys.argv[2]))
