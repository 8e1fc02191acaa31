"""Programs that end in one of many ways with a save in flight: `python endings.py CASES.json`.

Each case is a copy of this process, which has everything imported, and ends as a program of its
own would: it leaves the last line of this file. What it said and its exit code are printed.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Literal

# Registered before anything of dist_ckpt is imported, so called after all that it registers.
LATE: list[Callable[[], object]] = []
atexit.register(lambda: [call() for call in LATE])

import fsspec  # noqa: E402
import torch  # noqa: E402
from fsspec.implementations.local import LocalFileSystem  # noqa: E402

import dist_ckpt  # noqa: E402
import dist_ckpt.checkpointer  # noqa: E402  # at once: at their ends it is too late for torch
import dist_ckpt.functional  # noqa: E402
from dist_ckpt import policy  # noqa: E402
from dist_ckpt.errors import StorageError  # noqa: E402
from dist_ckpt.storage import (  # noqa: E402
    Store,
    resolve,
)
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, LatencyStore, Rule  # noqa: E402

# No program takes this long: one that does hangs, and says where.
LIMIT_SECONDS = int(os.environ.get("ENDING_LIMIT_SECONDS", "300"))
BROKEN = Fail(StorageError("the disk is made of cheese"))


class Pooled(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system that works in a pool of threads, as those of many services do."""

    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("gs://").rstrip("/")

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().pipe_file, path, value, **kwargs).result()


fsspec.register_implementation("gs", Pooled, clobber=True)


def limit() -> None:
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(LIMIT_SECONDS)


def store(url: str) -> Store:
    """Return the store of a case; so slow that the save is not over when the program is."""
    if url.startswith("gs://"):
        options = {"auto_mkdir": True}
        return LatencyStore(resolve(url, storage_options=options, single_writer=True), 0.005)
    return LatencyStore(resolve(url), 0.005)


def state() -> dict[str, Any]:
    return {"weights": {"w": torch.arange(100_000.0)}}


def begin(url: str) -> None:
    dist_ckpt.async_save(state(), store(url), step=1)


def last_statement(url: str) -> None:
    begin(url)


def checkpointer_without_with(url: str) -> None:
    dist_ckpt.Checkpointer(store(url), state()).save(1)


def dropped(url: str) -> None:
    ckpt = dist_ckpt.Checkpointer(store(url), state())
    handle = ckpt.save(1)
    del ckpt, handle
    gc.collect()


def exit_code(url: str) -> None:
    begin(url)
    sys.exit(3)


def exception(url: str) -> None:
    begin(url)
    raise ValueError("a mistake")


def exception_in_with(url: str) -> None:
    with dist_ckpt.Checkpointer(store(url), state()) as ckpt:
        ckpt.save(1)
        raise ValueError("a mistake")


def interrupt(url: str) -> None:
    begin(url)
    os.kill(os.getpid(), signal.SIGINT)


def terminated_with_handler(url: str) -> None:
    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    begin(url)
    os.kill(os.getpid(), signal.SIGTERM)


def terminated(url: str) -> None:
    hang = Hang()
    held = FaultyStore(resolve(url), [Rule("put", hang, key="*/manifest.json")])
    dist_ckpt.async_save(state(), held, step=1)
    hang.reached.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def left_at_once(url: str) -> None:
    hang = Hang()
    held = FaultyStore(resolve(url), [Rule("put", hang, key="*/manifest.json")])
    dist_ckpt.async_save(state(), held, step=1)
    hang.reached.wait()
    os._exit(0)


def thread_that_goes_on(url: str) -> None:
    def work() -> None:
        threading.main_thread().join()  # the program has ended by then
        begin(url)

    threading.Thread(target=work).start()


def daemon_thread(url: str) -> None:
    begun = threading.Event()

    def work() -> None:
        begin(url)
        begun.set()
        threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


def at_exit(url: str) -> None:
    atexit.register(begin, url)


def late_at_exit(url: str) -> None:
    LATE.append(lambda: begin(url))


def forked(url: str) -> None:
    child = os.fork()
    if child == 0:
        limit()
        begin(url)
        return  # the end of this very program
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def forked_after_a_save(url: str) -> None:
    """The child of a process that has connections of its own."""
    dist_ckpt.save(state(), store(url), step=0)
    forked(url)


def forked_beside_a_save(url: str) -> None:
    """A child ends at once, whatever its parent still has to do, and takes nothing of it away."""
    hang = Hang()
    held = FaultyStore(resolve(url), [Rule("put", hang, key="*/manifest.json")])
    ckpt = dist_ckpt.Checkpointer(held, state())
    ckpt.save(1)
    hang.reached.wait()
    child = os.fork()
    if child == 0:
        with ckpt:
            sys.exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hang.release()
    sys.exit(code)


Method = Literal["fork", "spawn", "forkserver"]


def process(url: str, method: Method, target: Callable[[str], None]) -> None:
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=target, args=(url,))
    child.start()
    child.join()
    sys.exit(child.exitcode)


def process_forked(url: str) -> None:
    process(url, "fork", begin)


def process_spawned(url: str) -> None:
    process(url, "spawn", begin)


def process_of_a_server(url: str) -> None:
    process(url, "forkserver", begin)


def process_that_fails_to_save(url: str) -> None:
    process(url, "fork", failed)


def spawned_process_that_fails_to_save(url: str) -> None:
    process(url, "spawn", failed)


def process_that_raises_and_fails_to_save(url: str) -> None:
    process(url, "fork", failed_with_exception)


def failed(url: str) -> None:
    slow = LatencyStore(resolve(url), 0.005)
    broken = FaultyStore(slow, [Rule("put", BROKEN, key="*.safetensors")])
    dist_ckpt.async_save(state(), broken, step=1)


def failed_with_code(url: str) -> None:
    failed(url)
    sys.exit(0)


def failed_with_exception(url: str) -> None:
    failed(url)
    raise ValueError("a mistake")


def failed_long_ago(url: str) -> None:
    broken = FaultyStore(resolve(url), [Rule("put", BROKEN, key="*.safetensors")])
    handle = dist_ckpt.async_save(state(), broken, step=1)
    while not handle.done():
        threading.Event().wait(0.001)
    del handle
    gc.collect()


def failed_without_close(url: str) -> None:
    broken = FaultyStore(resolve(url), [Rule("put", BROKEN, key="*.safetensors")])
    dist_ckpt.Checkpointer(broken, state()).save(1)


def failed_and_told(url: str) -> None:
    broken = FaultyStore(resolve(url), [Rule("put", BROKEN, key="*.safetensors")])
    handle = dist_ckpt.async_save(state(), broken, step=1)
    try:
        handle.wait()
    except StorageError as error:
        sys.stdout.write(f"caught: {error}\n")


def failed_and_cancelled(url: str) -> None:
    hang = Hang()
    held = FaultyStore(resolve(url), [Rule("put", hang, key="*.safetensors")])
    handle = dist_ckpt.async_save(state(), held, step=1)
    hang.reached.wait()
    handle.cancel()
    hang.release()


def pool_beside_a_signal_policy(url: str) -> None:
    """`terminate` of a pool is SIGTERM, which its processes must not swallow."""
    with dist_ckpt.Checkpointer(url, state(), when=policy.on_signal()) as ckpt:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
        pool.join()
        os.kill(os.getpid(), signal.SIGTERM)
        ckpt.step(1)
        assert ckpt.signaled == "SIGTERM"


def main(cases: list[tuple[str, str]], results: Path) -> None:
    """Run each case in a copy of this process; the copies leave this function, too."""
    # Threads of OpenMP do not survive a fork, and who then needs them waits for ever.
    torch.set_num_threads(1)
    gc.freeze()
    outcomes = {}
    for number, (way, url) in enumerate(cases):
        said = results / f"{number}.txt"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            limit()
            globals()[way](url)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes[f"{way} {url}"] = (code, said.read_text())
    (results / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
