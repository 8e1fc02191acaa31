"""What killed writers left in a directory: by its exact names, and never through a link."""

from __future__ import annotations

import os
import stat

from dist_ckpt.storage.base import MayGo, is_key, is_temporary
from dist_ckpt.storage.durable import NO_LOCKS, lock, prune


def sweep_files(root: str, prefix: str, may_go: MayGo) -> tuple[int, list[OSError]]:
    """Remove the temporary files of killed writers below the folder `prefix` of `root`.

    Returns:
        How many there were, and what failed: a folder that cannot be looked into, or a file that
        cannot be removed, keeps nobody from the others.
    """
    removed = 0
    failures: list[OSError] = []
    for directory, folders, names in os.walk(
        os.path.join(root, prefix).rstrip("/"), onerror=failures.append
    ):
        here = os.path.relpath(directory, root) + "/"
        here = "" if here == "./" else here
        # A folder that may hold nothing of ours is not looked into: it may be large, or closed.
        folders[:] = [name for name in folders if is_key(here + name) and may_go(f"{here}{name}/")]
        count = 0
        for name in names:
            if is_temporary(name) and may_go(here + name):
                try:
                    count += remove_abandoned(os.path.join(directory, name))
                except OSError as error:
                    failures.append(error)
        if count:
            prune(directory, root)
        removed += count
    # A folder that was there a moment ago was emptied by somebody else.
    return removed, [error for error in failures if not isinstance(error, FileNotFoundError)]


def remove_abandoned(path: str) -> bool:
    """Remove the temporary file `path` unless its writer lives; return whether it was removed."""
    try:
        # What bears such a name and is a link, a pipe or a folder was made by somebody else.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        if not lock(fd):
            return False
        # Still locked: a writer that opened it just now finds it gone and takes another name.
        os.unlink(path)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        # Without locks nobody can tell that the writer is dead, so the file stays.
        if error.errno in NO_LOCKS:
            return False
        raise
    finally:
        os.close(fd)
