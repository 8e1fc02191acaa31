"""Places that something new is to go to: what does not belong there is refused before a byte is.

Nothing that a run has is ever overwritten by it. But a folder of runs would be hidden behind a run
of its name, and in the folders of a run its own files come and go: what else lies there stays when
the step is deleted, or goes with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

from dist_ckpt.errors import ErrorKind, StorageError, UsageError
from dist_ckpt.format.names import (
    DISCARDS,
    MANIFEST,
    parse_save_id,
    parse_step_dir,
)
from dist_ckpt.repository.detached import named_step
from dist_ckpt.repository.repository import has_claims, is_run, run_below
from dist_ckpt.storage.base import Store, has
from dist_ckpt.storage.resolve import resolve


@contextmanager
def as_destination() -> Iterator[None]:
    """Within, that there is no bucket says nothing of a run that was asked for.

    Raises:
        StorageError: there is none.
    """
    try:
        yield
    except StorageError as error:
        if error.kind is not ErrorKind.NO_BUCKET:
            raise
        raise StorageError(error.message) from error


def check_new_run(store: Store, storage_options: Mapping[str, Any] | None = None) -> None:
    """Check that `store` may become a run, if it is none.

    Args:
        store: the place.
        storage_options: with which it was resolved.

    Raises:
        UsageError: it is a folder of runs, or lies among the files of a run.
        StorageError: it cannot be looked at.
    """
    with as_destination():
        _check_outside(store, storage_options)
        below = run_below(store)
    if below is not None:
        raise UsageError(
            f"{store.url} is a folder of runs, such as {below}, and no run itself: name one in it, "
            f"{store.url}/NAME"
        )


def check_new_files(
    store: Store, storage_options: Mapping[str, Any] | None = None, *, named: bool
) -> None:
    """Check that files of others may go to `store`.

    Args:
        store: the folder.
        storage_options: with which it was resolved.
        named: the name of the file was given: beside the folders of a run there may be any.

    Raises:
        UsageError: it is a run, or lies among the files of one.
        StorageError: it cannot be looked at.
    """
    with as_destination():
        _check_outside(store, storage_options)
        if not named and is_run(store, store.list_children()):
            raise UsageError(
                f"{store.url} is a run: name a file, or a folder that is not there yet"
            )


def _check_outside(store: Store, storage_options: Mapping[str, Any] | None) -> None:
    run = _run_around(store, storage_options)
    if run is not None:
        raise UsageError(
            f"{store.url} is among the files of the run {run}, where nothing else belongs: name "
            "another place"
        )
    # Nor is it of any use to the one who has a step directory by itself.
    step = named_step(store) if has(store, MANIFEST) else None
    if step is not None:
        raise UsageError(
            f"{store.url} is the checkpoint of step {step}, and nothing else belongs there: name "
            "another place"
        )


def _run_around(store: Store, storage_options: Mapping[str, Any] | None) -> str | None:
    """Return the url of the run in one of whose own folders `store` lies; None for none."""
    # Of a disk by where it is: `latest` may be a link to a step.
    url = store.url if "://" in store.url else os.path.realpath(store.url)
    names = url.split("/")
    for count in range(len(names), 0, -1):
        name = names[count - 1]
        # By the name first: nearly no place has one of these on its way, and nobody is asked.
        if parse_step_dir(name) is None and name not in ("claims", DISCARDS):
            continue
        # What cannot be looked at is told by whoever goes on to use the place, and a store of
        # somebody else may have a url that only that one can open.
        with (
            suppress(StorageError, UsageError),
            closing(resolve("/".join(names[:count]), storage_options=storage_options)) as folder,
        ):
            if _is_own(name, folder.list_children()):
                return "/".join(names[: count - 1])
    return None


def _is_own(name: str, children: list[str]) -> bool:
    """Whether a folder of this name, with these in it, is one of a run."""
    if parse_step_dir(name) is None:
        return has_claims(children)
    return MANIFEST in children or any(parse_save_id(child.rstrip("/")) for child in children)
