"""Bytes and time left of long work, on standard error where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import dist_ckpt
from dist_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from dist_ckpt.run import Run

Told = Callable[[int], None]
"""Called with how many bytes more are done."""


@contextmanager
def showing_work() -> Iterator[None]:
    """Show how copies, exports, imports, averages and saves of the body go on."""
    # In a log each look would be a line.
    if not sys.stderr.isatty():
        yield
        return
    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def told(event: object) -> None:
            if isinstance(event, dist_ckpt.events.WorkProgressed):
                doing = event.doing
            elif isinstance(event, dist_ckpt.events.SaveProgressed):
                doing = event.phase
            else:
                return
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing)
            done, total = event.nbytes_done, event.nbytes_total
            # What is done makes room for what comes next.
            bars.update(tasks[doing], completed=done, total=total, visible=done < total)

        with _hearing(told):
            yield


@contextmanager
def showing_reads(
    run: Run, step: int, *, nbytes: int | None = None, shares: int = 1
) -> Iterator[Run]:
    """Give a run for the body whose reads are shown as they go.

    Args:
        run: what is read from.
        step: which checkpoint of it.
        nbytes: how many bytes will be read; None for those of the whole checkpoint.
        shares: of how many shares of them one is read.
    """
    if not sys.stderr.isatty():
        yield run
        return
    storage: Any = import_module("dist_ckpt.storage")
    # Only a store that counts tells of reads, and counted twice a read is told of twice.
    metered = isinstance(run.store, storage.MeterStore)
    seen = run if metered else dist_ckpt.Run(storage.MeterStore(run.store))
    total = _nbytes(run, step) if nbytes is None else nbytes
    with showing_bytes(f"step {step}", total and total // shares) as more:

        def told(event: object) -> None:
            if (
                isinstance(event, dist_ckpt.events.StorageOperation)
                and event.operation == "read_into"
                # All stores of the process are heard here: another one may read beside, as in diff.
                and event.url == seen.url
            ):
                more(event.nbytes)

        with _hearing(told):
            yield seen


@contextmanager
def showing_bytes(doing: str, total: int | None) -> Iterator[Told]:
    """Give the body what it is to call with the bytes that are done.

    Args:
        doing: what the work is called.
        total: how many bytes there are, None where that is not known.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with _bars() as bars:
        task = bars.add_task(doing, total=total)
        yield lambda nbytes: bars.advance(task, nbytes)


@contextmanager
def _hearing(told: Callable[[object], None]) -> Iterator[None]:
    unsubscribe = dist_ckpt.events.subscribe(told)
    try:
        yield
    finally:
        unsubscribe()


def _bars() -> Any:
    # Only here: who works without a terminal waits for neither of them.
    rich: Any = import_module("rich.progress")
    console = import_module("rich.console").Console(stderr=True)
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
        # Gone at the end, so that what was said between bars reads on.
        transient=True,
    )


def _nbytes(run: Run, step: int) -> int | None:
    try:
        return run.manifest(step).nbytes
    except CheckpointError:
        return None  # which is what the work itself will tell
