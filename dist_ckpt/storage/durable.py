"""Files that appear whole and stay: the order of durability, written once, for POSIX systems.

A file is written under a temporary name beside its final one, made durable, then named, then the
name is made durable. Its writer holds a lock on the temporary until that name is gone, which is
how a sweep tells what a killed writer left from what a living one still needs. No
directory is ever renamed, and no decision rests on a time stamp.

A link is the one call of POSIX that gives a name only if nobody has it, also on a file system that
hosts share. Mounts of object stores and of drives in the cloud, SMB shares, FAT and exFAT have no
links. There a file is renamed, in a way that replaces nothing as far as this host can tell; other
hosts are kept away by whoever promised to be the only writer.

Everything here raises plain `OSError`, which the store maps, and a `StorageError` where there are
no links and nobody promised to be the only writer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dist_ckpt.errors import StorageError
from dist_ckpt.storage.base import (
    MayGo,
    PutMode,
    Stream,
    Watch,
    is_key,
    is_temporary,
    temporary_name,
)
from dist_ckpt.storage.direct import DirectIO, preallocate, write_buffered

_ATTEMPTS = 100
# What some network file systems let out: a code of the kernel for its own use.
_ENOTSUPP = 524
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, _ENOTSUPP)
_NO_DIRECTORY_FSYNC = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EISDIR,
    _ENOTSUPP,
)


def write_file(
    path: str,
    stream: Stream,
    *,
    mode: PutMode,
    anchor: str,
    direct: DirectIO,
    naming: Naming,
    watch: Watch | None,
) -> None:
    """Make `path` hold what `stream` makes, durably, whole or not at all; see `Store.put`.

    Missing directories are created; those from `anchor` down, an existing directory at or above
    that of `path`, are made durable whoever created them.

    Raises:
        FileExistsError: `mode="create"` and `path` exists.
        OSError: `path` is as before, but for `mode="replace"` with a failed last step: then it
            holds the new bytes, whole, and they may not survive a loss of power.
    """
    directory = os.path.dirname(path)
    fd, temporary, top = _open_temporary(directory)
    try:
        # From here on the temporary keeps its directories from being pruned by a deleter.
        preallocate(fd, stream.nbytes)
        if not direct.write(fd, stream, watch):
            write_buffered(fd, stream, watch)
        # The bytes and the way to them are durable before any reader can find a name for them.
        os.fsync(fd)
        for parent in _path_between(min(anchor, top, key=len), directory):
            sync_directory(parent)
        if mode == "create":
            naming.create(fd, temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        _discard(fd, temporary)
    try:
        # The name is durable before the caller hears of success.
        sync_directory(directory)
    except FileNotFoundError:
        # Somebody deleted the object and the folder that left empty: nothing to make durable.
        pass
    except OSError:
        if mode == "create":
            # A name that a loss of power could take away must not be seen before it does.
            os.unlink(path)
        raise


def sync_directory(path: str) -> None:
    """Make the names in the directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems know no such thing: their server has the name already.
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(fd)


def look_again(root: str, directory: str) -> None:
    """Make a network file system ask its server what is in `directory`, at or below `root`.

    A host may remember for a minute that a name does not exist, or which file bore it. It looks
    again in a folder that is opened.
    """
    for path in [*_path_between(root, directory), directory]:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError:
            # Not there, or only to be passed through: what is looked for tells more.
            return


def remove_exactly(path: str, data: bytes, naming: Naming) -> bool:
    """Remove the file `path` only if it holds `data`; return whether it did, and is gone."""
    try:
        if not _holds(path, data):
            return False
        aside = os.path.join(os.path.dirname(path), temporary_name())
        os.rename(path, aside)
    except (FileNotFoundError, NotADirectoryError):
        return False
    # Looked at once more where nobody else can reach it: what took the place of the file since the
    # first look is given its name back, where it would have been lost by an unlink.
    if _holds(aside, data):
        os.unlink(aside)
        return True
    fd = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        naming.create(fd, aside, path)
    finally:
        _discard(fd, aside)
    return False


def _holds(path: str, data: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(data) + 1) == data


def nearest_existing(path: str) -> str:
    """Return `path`, or the lowest above it that exists; the absolute `path` is a normal one.

    Raises:
        OSError: whether something exists cannot be told.
    """
    while True:
        try:
            os.lstat(path)
        except OSError as error:
            # What lies behind a link that leads round in circles does not exist either.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            path = os.path.dirname(path)
        else:
            return path


def free_bytes(path: str) -> int:
    """Return what the file system of `path`, or of where it would be, has left for this user."""
    status = os.statvfs(nearest_existing(path))
    return status.f_bavail * status.f_frsize


def prune(directory: str, root: str) -> None:
    """Remove `directory` and those above it, below `root`, as far as they are empty."""
    while len(directory) > len(root):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass
        except OSError:
            # Not empty, in use, or not ours to remove: an empty folder is never listed anyway.
            return
        directory = os.path.dirname(directory)


def _open_temporary(directory: str) -> tuple[int, str, str]:
    """Return a locked descriptor, its path, and the highest directory that got a new name."""
    for _ in range(_ATTEMPTS):
        temporary = os.path.join(directory, temporary_name())
        try:
            top = _make_directories(directory)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # a deleter pruned the directory in between
        try:
            if _lock_if_possible(fd) and os.fstat(fd).st_nlink:
                return fd, temporary, top
        except BaseException:
            _discard(fd, temporary)
            raise
        # A sweep was faster than the lock and removes the file; it is of no use any more.
        _discard(fd, temporary)
    raise StorageError(
        f"{directory} was removed each of {_ATTEMPTS} times that a file was begun in it; "
        "find out what deletes it"
    )


def _discard(fd: int, temporary: str) -> None:
    """Let go of a temporary, named by now or not; what cannot be removed is left to a sweep."""
    # Closed first: NFS would rename a file that is removed while open. It releases the lock too,
    # and after fsync has nothing left to report.
    with suppress(OSError):
        os.close(fd)
    with suppress(OSError):
        os.unlink(temporary)


def _make_directories(directory: str) -> str:
    """Create what is missing of `directory`; return the highest directory that got a new name."""
    top = nearest_existing(directory)
    _check_directory(top)
    for path in [*_path_between(top, directory), directory]:
        if path != top:
            try:
                os.mkdir(path)
            except FileExistsError:
                _check_directory(path)
    return top


def _check_directory(path: str) -> None:
    """Tell what stands in the way from what a deleter pruned since: a FileNotFoundError."""
    kind = os.lstat(path).st_mode
    if not stat.S_ISDIR(kind) and not (stat.S_ISLNK(kind) and os.path.isdir(path)):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _path_between(top: str, directory: str) -> Iterator[str]:
    """Yield `top` and the directories below it on the way to `directory`, without the latter."""
    chain: list[str] = []
    while len(directory) > len(top):
        directory = os.path.dirname(directory)
        chain.append(directory)
    return reversed(chain)


def lock(fd: int) -> bool:
    """Take the lock on the open file, which dies with its holder; False if another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_if_possible(fd: int) -> bool:
    try:
        return lock(fd)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True


# What killed writers left in a directory: by its exact names, and never through a link.


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
                    count += _remove_abandoned(os.path.join(directory, name))
                except OSError as error:
                    failures.append(error)
        if count:
            prune(directory, root)
        removed += count
    # A folder that was there a moment ago was emptied by somebody else.
    return removed, [error for error in failures if not isinstance(error, FileNotFoundError)]


def _remove_abandoned(path: str) -> bool:
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
        if error.errno in _NO_LOCKS:
            return False
        raise
    finally:
        os.close(fd)


# How a finished file gets its name when that must be new: by a hard link, or by a rename.


# Which of these a file system says that has no links is a matter of taste.
_NO_LINKS = frozenset(
    (
        errno.EPERM,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
        errno.EINVAL,
        _ENOTSUPP,
    )
)
_NO_FLAGS = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, _ENOTSUPP))
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
"""The call that renames and replaces nothing: Python has no name for it. None where C has none."""

if renameat2 is not None:
    renameat2.argtypes = (
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
    if renameat2 is not None:
        names = os.fsencode(temporary), os.fsencode(path)
        if not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
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
