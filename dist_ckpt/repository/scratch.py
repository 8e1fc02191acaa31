"""Folders that `doctor` and `bench` try a place in: theirs while they last, anybody's afterwards.

A note in each says which process it is of. So what one left that was killed is found and removed by
the next one and by a sweep, and what one is using is not.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dist_ckpt.errors import CheckpointError, IntegrityError, NotFound
from dist_ckpt.repository.history import passing_by
from dist_ckpt.storage.base import Store, Sweeper, read_all

_FOLDER = re.compile(r"dist-ckpt-scratch-[0-9a-f]{16}/")
_OWNER = "owner.json"
# All that is ever put into one.
_OURS = re.compile(r"owner\.json|object(-link)?|[0-9]{1,2}")
_LIMIT_BYTES = 1 << 16
# Nobody tries a place for so long.
_OLD_SECONDS = 86400.0


@contextmanager
def scratch(store: Store) -> Iterator[str]:
    """Give the body a folder of the store that nobody else uses, and remove all of it at the end.

    The folders of a disk that were made for it go, too.

    Raises:
        StorageError: what is in it could not be removed.
    """
    root = store.url if "://" not in store.url else ""
    above = _missing(root) if root else []
    folder = f"dist-ckpt-scratch-{secrets.token_hex(8)}/"
    try:
        # Where nothing can be put the body will find that out, and say so.
        with suppress(CheckpointError):
            store.put(f"{folder}{_OWNER}", [json.dumps(_this_process()).encode()])
        yield folder
    finally:
        store.delete([entry.key for entry in store.list_entries(folder)])
        for path in above:
            # Somebody else may have begun a run there meanwhile.
            if os.path.isdir(path) and not os.listdir(path):
                os.rmdir(path)


def is_same_place(one: Store, other: Store) -> bool:
    """Whether two stores are one place: whether what is put into `other` shows in `one`.

    Their urls do not tell that where there are links, mounts, or two names of a server.

    Raises:
        StorageError: see `scratch`.
    """
    with scratch(other) as folder:
        return next(iter(one.list_entries(folder)), None) is not None


def leftovers(store: Store, *, before: float | None = None) -> list[str]:
    """Return the folders whose process is gone, or that are old, and that have nothing of others.

    Args:
        store: the place.
        before: only those in which nothing was put since, in seconds since 1970.

    Raises:
        StorageError: a listing failed.
    """
    return [
        name
        for name in store.list_children()
        if _FOLDER.fullmatch(name) and _is_abandoned(store, name, before)
    ]


def remove_leftovers(
    store: Store, *, before: float | None = None, refused: list[str] | None = None
) -> list[str]:
    """Remove what `leftovers` finds; return those folders.

    What this user may not delete is left alone, and told; see `collect_garbage`.
    """
    removed = []
    for folder in leftovers(store, before=before):
        with passing_by(store, folder, refused):
            if isinstance(store, Sweeper):
                # What was left half put is in no listing.
                store.sweep(folder)
            store.delete([entry.key for entry in store.list_entries(folder)])
            removed.append(folder)
    return removed


def _is_abandoned(store: Store, folder: str, before: float | None) -> bool:
    newest = 0.0
    for entry in store.list_entries(folder):
        if not _OURS.fullmatch(entry.key.removeprefix(folder)):
            return False
        # Where the store does not say when, it was just now, and its process has to be asked for.
        newest = max(newest, time.time() if entry.modified is None else entry.modified)
    if before is not None and newest >= before:
        return False
    return newest < time.time() - _OLD_SECONDS or _is_gone(store, folder)


def _is_gone(store: Store, folder: str) -> bool:
    """Whether the process that made a folder is known not to run any more."""
    try:
        owner = json.loads(read_all(store, f"{folder}{_OWNER}", limit_bytes=_LIMIT_BYTES))
    except (NotFound, IntegrityError, ValueError):
        return False
    here = _this_process()
    if not isinstance(owner, dict) or not here["space"] or owner.get("space") != here["space"]:
        return False  # of another host, or container: nobody here can tell
    pid = owner.get("pid")
    # Numbers of processes come again, and one that began at another time is another process.
    return isinstance(pid, int) and pid > 0 and owner.get("began") != _began(pid)


def _this_process() -> Mapping[str, Any]:
    """Return what tells this process from all others, and in which space its number counts."""
    pid = os.getpid()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        space = ""  # a system that does not say
    return {"space": space, "pid": pid, "began": _began(pid)}


def _began(pid: int) -> str:
    """Return when a process began, as the kernel counts it; "" where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name of the program, in parentheses, may hold anything.
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _missing(path: str) -> list[str]:
    """Return the folders on the way to `path` that are not there, the deepest first."""
    found = []
    while path and not os.path.lexists(path):
        found.append(path)
        path = os.path.dirname(path)
    return found
