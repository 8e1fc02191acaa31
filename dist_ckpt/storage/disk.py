"""Files of a disk: their bytes at its speed, and their names, which appear whole and stay.

A file is written under a temporary name beside its final one, made durable, then named, then the
name is made durable. Its writer holds a lock on the temporary until that name is gone, which is
how a sweep tells what a killed writer left from what a living one still needs. No
directory is ever renamed, and no decision rests on a time stamp.

A link is the one call of POSIX that gives a name only if nobody has it, also on a file system that
hosts share. Mounts of object stores and of drives in the cloud, SMB shares, FAT and exFAT have no
links. There a file is renamed, in a way that replaces nothing as far as this host can tell; other
hosts are kept away by whoever promised to be the only writer.

`O_DIRECT` moves whole sectors between aligned memory and aligned places of a file, past the page
cache. What is not aligned is copied through aligned memory or goes through the page cache. Whether
a file system takes it at all is found by trying, once for each mount: it may refuse the flag, or
only the first transfer (both with `EINVAL`).

Everything here raises plain `OSError`, which the store maps, a `StorageError` where there are no
links and nobody promised to be the only writer, and an `IntegrityError` for bytes that read
otherwise than they were written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from dist_ckpt.errors import ErrorKind, IntegrityError, StorageError
from dist_ckpt.storage.base import (
    PIECE_BYTES,
    PutMode,
    Scatter,
    Stream,
    Watch,
    temporary_name,
)
from dist_ckpt.threads import in_parallel

_ATTEMPTS = 100
# What some network file systems let out: a code of the kernel for its own use.
_ENOTSUPP = 524
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, _ENOTSUPP)
"""What `lock` fails with on a file system that has no locks."""

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


def _open_temporary(directory: str) -> tuple[int, str, str]:
    """Return a locked descriptor, its path, and the highest directory that got a new name."""
    for _ in range(_ATTEMPTS):
        temporary = os.path.join(directory, temporary_name())
        try:
            top = _make_directories(directory)
            # To be read as well: what was written may be compared before it gets its name.
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
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
        f"{directory} could not be made, or was removed again, each of {_ATTEMPTS} times that a "
        "file was begun in it; choose another place, or find out what deletes it"
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
        if error.errno not in NO_LOCKS:
            raise
        return True


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


# Bytes between memory and an open file: in parallel, past the page cache.


DIRECT_BYTES = 1 << 20
"""From how many bytes on it pays to share a transfer out and to go past the page cache."""

_SECTOR_BYTES = 4096  # aligned to this is aligned for every disk and file system there is
READ_BYTES = 8 << 20
"""How much one call reads, at most."""

_BUFFERS_PER_CALL = 1024  # IOV_MAX of Linux
# Two writers keep a disk busy, also while one of them copies; reads gain from a deeper queue.
_WRITE_THREADS = 2
# Where each of them reads what it wrote, two write and one reads, on average.
_COMPARE_THREADS = 3
_COMPARED_BYTES = 2 << 20
_READ_THREADS = 8
_HUGE_PAGE_BYTES = 2 << 20
_NOT_PREALLOCATED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The flag of `open`; 0 on systems that do not know it."""

# Where a file system cannot, os.posix_fallocate writes to every sector instead, which over a
# network takes minutes.
fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
"""The one call that reserves room or says that it cannot; None where the C library has it not."""

if fallocate is not None:
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def aligned_buffer(nbytes: int) -> memoryview:
    """Return `nbytes` of zeroed memory that starts on a page, so that reads need no other copy."""
    # Private, unlike the default: only then huge pages are given out, at a quarter of the cost.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
    if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:nbytes]


def preallocate(fd: int, nbytes: int) -> None:
    """Reserve room for a file of `nbytes`, so that a full disk shows before anything is written.

    Room that is there already needs no lock of the whole file when it is written to. Nothing
    happens where the file system cannot reserve.
    """
    if nbytes < DIRECT_BYTES or fallocate is None:
        return
    while fallocate(fd, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code in _NOT_PREALLOCATED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_buffered(fd: int, views: Iterable[memoryview], watch: Watch | None) -> None:
    """Write `views` one after another through the page cache, from the start of the file on."""
    for _, run in _cut(views, PIECE_BYTES):
        if watch is not None:
            watch(sum(view.nbytes for view in run))
        for first in range(0, len(run), _BUFFERS_PER_CALL):
            _write_group(fd, list(run[first : first + _BUFFERS_PER_CALL]))


class DirectIO:
    """Parallel transfers of one store, and what it found out about the mounts below it."""

    def __init__(self) -> None:
        self._refused: set[int] = set()

    @property
    def refused(self) -> bool:
        """Whether a mount was met that does not take direct transfers."""
        return bool(self._refused)

    def write(self, fd: int, stream: Stream, watch: Watch | None) -> bool:
        """Write what `stream` makes to the empty file `fd` if that is to be done directly.

        Args:
            fd: the file.
            stream: asked for its pieces by one thread at a time.
            watch: see `Store.put`.

        Returns:
            Whether it was done. If not, some places may hold bytes already, and the position of the
            file is still its start: `write_buffered` does it all.

        Raises:
            IntegrityError: see `Stream.compared`; bytes behind the last whole sector are not read.
        """
        if stream.nbytes < DIRECT_BYTES or not self._turn_on(fd):
            return False
        tails: list[tuple[int, memoryview]] = []
        buffers: list[memoryview] = []

        def write(piece: tuple[int, Sequence[memoryview]]) -> None:
            offset, run = piece
            if watch is not None:
                watch(sum(view.nbytes for view in run))
            data = _in_aligned_memory(run)
            whole = data.nbytes - data.nbytes % _SECTOR_BYTES
            write_at(fd, data[:whole], offset)
            if stream.compared is not None and whole:
                # While another thread writes: the disk has one way in and another one out.
                _compare(fd, data[:whole], offset, buffers)
                stream.compared(offset, whole)
            if whole < data.nbytes:
                tails.append((offset + whole, data[whole:]))

        try:
            most = _WRITE_THREADS if stream.compared is None else _COMPARE_THREADS
            threads = min(most, -(-stream.nbytes // PIECE_BYTES))
            in_parallel(write, _cut(stream, PIECE_BYTES), threads=threads)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            self._refuse(fd)
            return False
        # Only now, because a flag is of the file and not of one transfer.
        _turn_off(fd)
        for offset, tail in tails:
            write_at(fd, tail, offset)
        return True

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Fill `views` from `offset` of the file on; return how many bytes there were."""
        if sum(view.nbytes for view in views) < DIRECT_BYTES:
            return _read_at(fd, Scatter(views), offset, sector_bytes=1)
        if offset % _SECTOR_BYTES == 0 and _are_sectors(views) and self._turn_on(fd):
            try:
                return _read_pieces(fd, views, offset, sector_bytes=_SECTOR_BYTES)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self._refuse(fd)
        return _read_pieces(fd, views, offset, sector_bytes=1)

    def _turn_on(self, fd: int) -> bool:
        if not O_DIRECT or os.fstat(fd).st_dev in self._refused:
            return False
        try:
            # Turned on in an open file, so that it is certainly the file that was looked at.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            self._refuse(fd)
            return False
        return True

    def _refuse(self, fd: int) -> None:
        self._refused.add(os.fstat(fd).st_dev)
        _turn_off(fd)


def _turn_off(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)


def _cut(
    views: Iterable[memoryview], piece_bytes: int
) -> Iterator[tuple[int, Sequence[memoryview]]]:
    """Yield the bytes of `views` in pieces of `piece_bytes`, each with its offset in the whole."""
    offset, run, room = 0, [], piece_bytes
    for view in views:
        done = 0
        while done < view.nbytes:
            run.append(view[done : done + room])
            done += run[-1].nbytes
            room -= run[-1].nbytes
            if not room:
                yield offset, run
                offset, run, room = offset + piece_bytes, [], piece_bytes
    if run:
        yield offset, run


def _in_aligned_memory(run: Sequence[memoryview]) -> memoryview:
    """Return the bytes of `run` one after another on a page: the one view there is, or a copy."""
    if len(run) == 1 and _is_aligned(run[0]):
        return run[0]
    copy = aligned_buffer(sum(view.nbytes for view in run))
    done = 0
    for view in run:
        # Not by slices of views: numpy lets the other threads run meanwhile.
        np.copyto(_as_array(copy[done : done + view.nbytes]), _as_array(view))
        done += view.nbytes
    return copy


def _compare(fd: int, data: memoryview, offset: int, buffers: list[memoryview]) -> None:
    """Compare whole sectors that were written at `offset` with what the disk has there.

    Args:
        fd: the file, past the page cache: what that holds says nothing about the disk.
        data: what was written.
        offset: where.
        buffers: memory to read to, taken from and given back by one thread at a time.
    """
    buffer = buffers.pop() if buffers else aligned_buffer(_COMPARED_BYTES)
    for start in range(0, data.nbytes, _COMPARED_BYTES):
        written = data[start : start + _COMPARED_BYTES]
        found = buffer[: written.nbytes]
        count = _read_at(fd, Scatter([found]), offset + start, sector_bytes=_SECTOR_BYTES)
        # By words, without the lock of the interpreter; memoryviews compare byte by byte.
        ours, there = (_as_array(view).view(np.uint64) for view in (written, found))
        if count != written.nbytes or not np.array_equal(ours, there):
            raise IntegrityError(
                f"what was written reads otherwise between the bytes {offset + start} and "
                f"{offset + start + written.nbytes}: nothing was stored. Check the disk",
                kind=ErrorKind.DIGEST,
            )
    buffers.append(buffer)


def _write_group(fd: int, group: list[memoryview]) -> None:
    while group:
        count = _some(os.writev(fd, group))
        # A write may be short anywhere: after 2 GiB, at a limit, on a signal.
        while group and count >= group[0].nbytes:
            count -= group.pop(0).nbytes
        if count:
            group[0] = group[0][count:]


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` to a file, from `offset` on.

    Raises:
        OSError: the system refused some of it.
    """
    done = 0
    while done < data.nbytes:
        done += _some(os.pwrite(fd, data[done:], offset + done))


def _some(count: int) -> int:
    if not count:
        raise OSError(errno.EIO, "the file system took no byte and gave no reason")
    return count


def _read_pieces(fd: int, views: Sequence[memoryview], offset: int, *, sector_bytes: int) -> int:
    """Read pieces of `views` in parallel; return how many bytes there are before the first gap."""
    pieces = [(start, Scatter(run)) for start, run in _cut(views, READ_BYTES)]
    counts: dict[int, int] = {}

    def read(piece: tuple[int, Scatter]) -> None:
        start, into = piece
        counts[start] = _read_at(fd, into, offset + start, sector_bytes=sector_bytes)

    in_parallel(read, pieces, threads=min(_READ_THREADS, len(pieces)))
    for start, into in pieces:
        # A file that another shrinks meanwhile may have bytes after the first that is missing.
        if counts[start] < into.nbytes:
            return start + counts[start]
    return sum(counts.values())


def _read_at(fd: int, into: Scatter, offset: int, *, sector_bytes: int) -> int:
    """Fill `into`, reading whole sectors of `sector_bytes`; return how many bytes there were."""
    whole = into.nbytes - into.nbytes % sector_bytes
    reached = done = 0
    while done < whole:
        reached = done + os.preadv(fd, into.cut(done, whole)[:_BUFFERS_PER_CALL], offset + done)
        # A short read in the middle of a sector is gone on with from its start.
        again = reached - reached % sector_bytes
        if again == done:
            break
        done = again
    if reached < whole or whole == into.nbytes:
        return reached
    sector = aligned_buffer(sector_bytes)
    count = min(os.preadv(fd, [sector], offset + whole), into.nbytes - whole)
    into.write(whole, sector[:count])
    return whole + count


def _are_sectors(views: Sequence[memoryview]) -> bool:
    """Whether sectors can be read to `views`: only the last one may end inside of one."""
    whole = all(view.nbytes % _SECTOR_BYTES == 0 for view in views[:-1])
    return whole and all(map(_is_aligned, views))


def _is_aligned(view: memoryview) -> bool:
    # Not by `ctypes.data`, which takes ten times as long, at each read.
    address: int = _as_array(view).__array_interface__["data"][0]
    return address % _SECTOR_BYTES == 0


def _as_array(view: memoryview) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.frombuffer(view, dtype=np.uint8)
