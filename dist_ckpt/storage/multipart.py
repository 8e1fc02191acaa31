"""How an object is cut for a server: sizes of parts, and bodies that copy nothing."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import AsyncIterator, Callable, Sequence

from dist_ckpt.errors import UsageError

MIB = 1 << 20
# The limits of S3 for uploads in parts; the least size is that of all parts but the last.
MAX_PARTS = 10_000
MIN_PART_BYTES = 5 * MIB
MAX_PART_BYTES = 5 << 30
MAX_OBJECT_BYTES = 5 << 40

_CHUNK_BYTES = 256 << 10
"""What is handed to a socket at once: large enough to be cheap, small enough to see a stall."""


def part_bytes(nbytes: int, *, preferred: int) -> int:
    """Return the size of the parts of an object, the last of which may be smaller.

    It is `preferred` where that is allowed and the object then has no more than `MAX_PARTS`
    parts, else larger by whole MiB.

    Args:
        nbytes: of the object.
        preferred: the size wanted.

    Raises:
        UsageError: the object is larger than `MAX_OBJECT_BYTES`.
    """
    if nbytes > MAX_OBJECT_BYTES:
        raise UsageError(
            f"an object of {nbytes} bytes is over the {MAX_OBJECT_BYTES} that S3 holds: save with "
            "more ranks or in more parts"
        )
    least = -(-nbytes // MAX_PARTS)
    wanted = min(max(preferred, MIN_PART_BYTES), MAX_PART_BYTES)
    return wanted if wanted >= least else -(-least // MIB) * MIB


def spans(nbytes: int, size: int) -> list[tuple[int, int]]:
    """Return `(start, stop)` of each piece of `size` bytes of `nbytes`; the last may be smaller."""
    return [(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]


def cut_parts(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Return views of the bytes `start:stop` of the concatenation of `views`; no copies.

    Args:
        views: flat views of bytes.
        start: of the first byte.
        stop: behind the last byte, which exists.
    """
    found: list[memoryview] = []
    begin = 0
    for view in views:
        end = begin + view.nbytes
        if end > start and begin < stop:
            found.append(view[max(start - begin, 0) : stop - begin])
        begin = end
    return found


def crc32(views: Sequence[memoryview]) -> str:
    """Return the CRC-32 of the concatenation of `views` as S3 writes it, in base64."""
    value = 0
    for view in views:
        value = zlib.crc32(view, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


class Body:
    """The bytes of `views` as the body of one request, sent from where they are.

    What signs requests takes it for a file; what sends them iterates over it.

    Args:
        views: flat views of bytes; they may not change before the request has ended.
        progress: called whenever the connection has taken another chunk.
    """

    def __init__(self, views: Sequence[memoryview], progress: Callable[[], None]) -> None:
        self._views = list(views)
        self._nbytes = sum(view.nbytes for view in views)
        self._progress = progress
        self._at = 0

    def __len__(self) -> int:
        return self._nbytes

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = base + offset
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Return a copy of up to `count` bytes from the position on."""
        stop = self._nbytes if count < 0 else min(self._nbytes, self._at + count)
        data = b"".join(cut_parts(self._views, self._at, stop))
        self._at += len(data)
        return data

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        # Always all of it: a request that was redirected is sent again from the begin.
        for view in self._views:
            for start in range(0, view.nbytes, _CHUNK_BYTES):
                self._progress()
                yield view[start : start + _CHUNK_BYTES]
        # The last chunk has been taken only now: from here on the server has time to answer.
        self._progress()
