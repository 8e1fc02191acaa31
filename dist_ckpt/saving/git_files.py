"""The commit of a checkout, read from its files.

`git` is not run: what it runs in turn is said by the files of the checkout (monitors of the file
system, filters, hooks, configuration that is included), and those may be anybody's. So it is not
known either whether the program was changed since the commit.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_LIMIT_BYTES = 1 << 24
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# No part of it begins with a dot, so it leads nowhere else.
_REF = re.compile(r"refs(?:/[A-Za-z0-9_@+=#%{}~,-][A-Za-z0-9_@+=#%{}~,.-]*)+")
_MAX_LINKS = 5


def commit_of(folder: Path) -> str | None:
    """Return the commit that the checkout around `folder` is at, None if that cannot be told."""
    try:
        for parent in (folder, *folder.parents):
            if os.path.lexists(parent / ".git"):
                return _head(_directory(parent))
    # A broken or unreadable checkout is no reason for anything to fail.
    except (OSError, ValueError):
        return None
    return None


def _directory(checkout: Path) -> Path:
    """Return where git keeps what belongs to `checkout`: worktrees and submodules say it."""
    place = checkout / ".git"
    if place.is_dir():
        return place
    said = _text(place).removeprefix("gitdir: ")
    return checkout / said


def _head(directory: Path) -> str | None:
    common = directory
    if (directory / "commondir").exists():
        common = directory / _text(directory / "commondir")
    said = _text(directory / "HEAD")
    for _ in range(_MAX_LINKS):
        if _COMMIT.fullmatch(said):
            return said
        name = said.removeprefix("ref: ")
        if name == said or _REF.fullmatch(name) is None:
            return None
        for place in (directory, common):
            if (place / name).is_file():
                said = _text(place / name)
                break
        else:
            return _packed(common, name)
    return None


def _packed(common: Path, name: str) -> str | None:
    if not (common / "packed-refs").exists():
        return None
    for line in _lines(common / "packed-refs"):
        commit, _, ref = line.partition(" ")
        if ref == name and _COMMIT.fullmatch(commit):
            return commit
    return None


def _text(path: Path) -> str:
    return next(_lines(path), "").strip()


def _lines(path: Path) -> Iterator[str]:
    # Opened without waiting: a pipe in its place would never say anything.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        yield from file.read(_LIMIT_BYTES).decode(errors="replace").splitlines()
