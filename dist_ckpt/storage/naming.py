"""How a finished file gets its name when that must be new: by a hard link, or by a rename.

A link is the one call of POSIX that gives a name only if nobody has it, also on a file system that
hosts share. Mounts of object stores and of drives in the cloud, SMB shares, FAT and exFAT have no
links. There a file is renamed, in a way that replaces nothing as far as this host can tell; other
hosts are kept away by whoever promised to be the only writer.

Everything here raises plain `OSError`, and a `StorageError` where no promise was made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dist_ckpt.errors import StorageError

# Which of these a file system says that has no links is a matter of taste. 524 is what some
# network file systems let out, a code of the kernel for its own use.
_NO_LINKS = frozenset(
    (
        errno.EPERM,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
        errno.EINVAL,
        524,
    )
)
_NO_FLAGS = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, 524))
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

# Python has no name for the call, and some C libraries have none either.
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )

# Of all stores of the process: two of them may be about one folder.
_renaming = threading.Lock()


class Naming:
    """Gives files new names in one store; what it finds out about mounts holds for all later ones.

    Args:
        single_writer: the caller promises that one host at a time creates files in the store.
    """

    def __init__(self, *, single_writer: bool) -> None:
        self._single_writer = single_writer
        self._linkless: set[int] = set()

    @property
    def atomic(self) -> bool:
        """Whether one of several writers wins, by the file system or by promise, as far as known.

        True before the first file was named: nothing is written to find out.
        """
        return self._single_writer or not self._linkless

    def create(self, fd: int, temporary: str, path: str) -> None:
        """Give the open, durable file `temporary` the name `path` unless that exists.

        It is the one atomic step of a create: before it `path` is not there, after it whole.

        Raises:
            FileExistsError: `path` exists.
            StorageError: there are no hard links, and nobody promised to be the only writer.
        """
        device = os.fstat(fd).st_dev
        # A call that fails is not repeated for every file: over a network it costs a round trip.
        if device not in self._linkless:
            try:
                _link(fd, temporary, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._linkless.add(device)
                reason = error.strerror
            else:
                return
        else:
            reason = "as was found before"
        if not self._single_writer:
            raise StorageError(
                f"cannot create {path}: its file system makes no hard links ({reason}), and "
                "without them two jobs could commit the same step. If only one job at a time "
                "writes to the run, open it by resolve(path, single_writer=True) and give that "
                "store in place of the path; else use another file system"
            )
        _rename(fd, temporary, path)


def _link(fd: int, temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may do the link and lose the answer. Which file has the name tells
        # who won; the count of names would not, which a host may remember from before.
        if not _is_named(fd, path):
            raise


def _rename(fd: int, temporary: str, path: str) -> None:
    # What has no links often sends bytes only when a file is closed, and only that answer tells
    # whether they were taken. A second descriptor is closed: the first one keeps the lock by
    # which a sweep knows that the file is needed.
    os.close(os.dup(fd))
    try:
        _rename_to_new(temporary, path)
    except OSError:
        # As for a link whose answer was lost. Inode numbers may be invented where there are no
        # links, so the old name has to be gone as well.
        if os.path.lexists(temporary) or not _is_named(fd, path):
            raise


def _rename_to_new(temporary: str, path: str) -> None:
    if _renameat2 is not None:
        names = os.fsencode(temporary), os.fsencode(path)
        if not _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
            return
        code = ctypes.get_errno()
        if code not in _NO_FLAGS:
            raise OSError(code, os.strerror(code), path)
    with _alone_in(os.path.dirname(path)):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.rename(temporary, path)


@contextmanager
def _alone_in(directory: str) -> Iterator[None]:
    """Keep the other writers of this host from looking into `directory` and naming files there."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _renaming:
            # More than was promised, so that a mistake on one host does no harm: two programs
            # that both promise. Where folders cannot be locked the promise has to do.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
    finally:
        os.close(fd)


def _is_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
