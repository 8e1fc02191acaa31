"""Ranges of one object of S3, read at once, each straight to its place."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from dist_ckpt.storage.multipart import MIB, spans
from dist_ckpt.storage.s3_client import Answer, Client, stall_watch, together
from dist_ckpt.storage.s3_errors import BEHIND_THE_END, FOREIGN, Changed, Truncated, code_of
from dist_ckpt.storage.scatter import Scatter

# As large as what peers ask for at once: less costs processor time for each request.
_PIECE_BYTES = 16 * MIB
_TRIES = 3
_CONTENT_RANGE = re.compile(r"bytes (?P<first>\d+)-\d+/(?P<total>\d+)")


@dataclass(frozen=True, slots=True)
class _Version:
    etag: str
    nbytes: int


class Download:
    """One range of one object.

    Args:
        client: makes the requests.
        target: `Bucket` and `Key`.
        offset: of the first byte wanted.
        into: where the bytes go; not empty.
    """

    def __init__(self, client: Client, target: dict[str, str], offset: int, into: Scatter) -> None:
        self._client = client
        self._target = target
        self._offset = offset
        self._into = into
        self._version: _Version | None = None

    async def run(self) -> int:
        """Read the range; return how many bytes of it there were.

        Raises:
            Changed: the object was replaced again and again while it was read.
        """
        for _ in range(_TRIES - 1):
            with suppress(Changed):
                return await self._read()
        return await self._read()

    async def _read(self) -> int:
        self._version = None
        pieces = spans(self._into.nbytes, _PIECE_BYTES)
        counts = await together(
            (partial(self._read_piece, *piece) for piece in pieces),
            at_once=min(len(pieces), self._client.concurrency),
        )
        for (start, stop), count in zip(pieces, counts, strict=True):
            # A piece found behind the end, of an object that another piece found to be longer.
            if count != max(0, self._end(stop) - start):
                raise Changed("its size changed while it was read")
        return sum(counts)

    async def _read_piece(self, start: int, stop: int) -> int:
        done = start

        async def attempt() -> None:
            nonlocal done
            # Goes on where the attempt before broke off.
            first = self._offset + done
            byte_range = f"bytes={first}-{self._offset + stop - 1}"
            async with stall_watch(self._client.stall_seconds) as progress:
                try:
                    answer = await self._client.send(
                        "get_object", {**self._target, "Range": byte_range}
                    )
                except FOREIGN as error:
                    if code_of(error) in BEHIND_THE_END:
                        return
                    raise
                body = answer["Body"]
                try:
                    self._check_version(answer, first)
                    end = self._end(stop)
                    content = body.raw_stream.content
                    while chunk := await content.readany():
                        progress()
                        if len(chunk) > end - done:
                            raise Truncated(f"more bytes than {byte_range} arrived")
                        self._into.write(done, chunk)
                        done += len(chunk)
                finally:
                    body.close()
            if done < end:
                raise Truncated(f"{end - done} bytes of {byte_range} did not arrive")

        await self._client.repeat(attempt)
        return done - start

    def _end(self, stop: int) -> int:
        """Return where in the range the object ends, at most `stop`."""
        return min(stop, self._version.nbytes - self._offset) if self._version else 0

    def _check_version(self, answer: Answer, first: int) -> None:
        text = str(answer.get("ContentRange", ""))
        match = _CONTENT_RANGE.fullmatch(text)
        if match is None or int(match["first"]) != first:
            raise Truncated(f"byte {first} was asked for, and the answer is of {text or 'all'}")
        version = _Version(str(answer.get("ETag", "")), int(match["total"]))
        if self._version not in (None, version):
            raise Changed("it was replaced while it was read")
        self._version = version
