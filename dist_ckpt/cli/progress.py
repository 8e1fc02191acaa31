"""Bytes and time left of long work, on standard error where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import dist_ckpt
from dist_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from dist_ckpt.run import Run
    from dist_ckpt.storage import Store


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
    # Only here: who works without a terminal waits for neither of them.
    rich: Any = import_module("rich.progress")
    storage: Any = import_module("dist_ckpt.storage")
    metered = isinstance(run.store, storage.MeterStore)
    seen = run if metered else dist_ckpt.Run(storage.MeterStore(run.store))
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    console = import_module("rich.console").Console(stderr=True)
    with rich.Progress(*columns, console=console, transient=True) as bar:
        total = _nbytes(run, step) if nbytes is None else nbytes
        task = bar.add_task(f"step {step}", total=total and total // shares)

        def told(event: object) -> None:
            if (
                isinstance(event, dist_ckpt.events.StorageOperation)
                and event.operation == "read_into"
                and event.url == seen.url
            ):
                bar.advance(task, event.nbytes)

        unsubscribe = dist_ckpt.events.subscribe(told)
        try:
            yield seen
        finally:
            unsubscribe()


@contextmanager
def showing_part(url: str, step: int | None, part: str) -> Iterator[str | Store]:
    """Give the place `url` for the body, as one whose reads are shown where it is a run.

    Args:
        url: a run, or whatever else is opened.
        step: which checkpoint of it; None for the newest.
        part: what of it will be read.
    """
    run = _run_at(url) if sys.stderr.isatty() else None
    if run is None:
        yield url
        return
    with dist_ckpt.open_checkpoint(run.store, step=step) as opened:
        nbytes = sum(info.nbytes for info in opened.info.values() if info.part == part)
    with showing_reads(run, opened.step, nbytes=nbytes) as seen:
        yield seen.store


def _run_at(url: str) -> Run | None:
    try:
        run = dist_ckpt.Run(url)
        return None if run.latest() is None else run
    except CheckpointError:
        return None  # a file, or what else another program wrote


def _nbytes(run: Run, step: int) -> int | None:
    try:
        return run.manifest(step).nbytes
    except CheckpointError:
        return None  # which is what the work itself will tell
