"""Bytes between memory and an open file at the speed of the disk: in parallel, past the page cache.

`O_DIRECT` moves whole sectors between aligned memory and aligned places of a file. What is not
aligned is copied through aligned memory or goes through the page cache. Whether a file system takes
it at all is found by trying, once for each mount: it may refuse the flag, or only the first
transfer (both with `EINVAL`).

Everything here raises plain `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from dist_ckpt.storage.base import PIECE_BYTES, Scatter, Stream, Watch
from dist_ckpt.threads import in_parallel

DIRECT_BYTES = 1 << 20
"""From how many bytes on it pays to share a transfer out and to go past the page cache."""

_SECTOR_BYTES = 4096  # aligned to this is aligned for every disk and file system there is
READ_BYTES = 8 << 20
"""How much one call reads, at most."""

_BUFFERS_PER_CALL = 1024  # IOV_MAX of Linux
# Two writers keep a disk busy, also while one of them copies; reads gain from a deeper queue.
_WRITE_THREADS = 2
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
        """
        if stream.nbytes < DIRECT_BYTES or not self._turn_on(fd):
            return False
        tails: list[tuple[int, memoryview]] = []

        def write(piece: tuple[int, Sequence[memoryview]]) -> None:
            offset, run = piece
            if watch is not None:
                watch(sum(view.nbytes for view in run))
            data = _in_aligned_memory(run)
            whole = data.nbytes - data.nbytes % _SECTOR_BYTES
            write_at(fd, data[:whole], offset)
            if whole < data.nbytes:
                tails.append((offset + whole, data[whole:]))

        try:
            threads = min(_WRITE_THREADS, -(-stream.nbytes // PIECE_BYTES))
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
