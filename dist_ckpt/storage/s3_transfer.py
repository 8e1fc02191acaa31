"""One object on its way to S3, in one request, in parts, or while it is made; and back."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_ckpt.storage.base import Scatter, Stream, Watch
from dist_ckpt.storage.multipart import MIB, Body, crc32, cut_parts, spans
from dist_ckpt.storage.s3_client import Answer, Client, stall_watch, together
from dist_ckpt.storage.s3_errors import (
    BEHIND_THE_END,
    EXISTS,
    FOREIGN,
    NO_SUCH_OBJECT,
    NO_SUCH_UPLOAD,
    Changed,
    Truncated,
    Verdict,
    code_of,
    judge,
)

_MARK = "dist-ckpt-put"
_COMPLETE_PATIENCE = 10.0
"""The server may assemble thousands of parts before it answers."""

_ABORTS = 3


class Upload:
    """One attempt to store an object.

    The object bears a mark that is drawn for this attempt. Where an answer was lost, the mark of
    what is stored tells whether it is this attempt's, whatever its bytes are.

    Args:
        client: makes the requests.
        target: `Bucket` and `Key`.
        views: flat views of the bytes.
        create: fail where the key exists.
        conditional: the server refuses a condition that does not hold, so that creating is atomic;
            otherwise it is looked at first.
        watch: see `Store.put`; called off the event loop, which it may hold up.

    Attributes:
        nbytes: the size of the object.
        conditional: whether it is the server that decides who creates.
    """

    def __init__(
        self,
        client: Client,
        target: dict[str, str],
        views: Sequence[memoryview],
        *,
        create: bool,
        conditional: bool,
        watch: Watch | None = None,
    ) -> None:
        self._client = client
        self._target = target
        self._views = views
        self.nbytes = sum(view.nbytes for view in views)
        self._create = create
        self.conditional = create and conditional
        self._condition = {"IfNoneMatch": "*"} if self.conditional else {}
        self._watch = watch
        self._mark = {_MARK: secrets.token_hex(8)}

    async def put_whole(self) -> bool:
        """Store the object by one request; return False where the key exists."""
        if self._create and not self._condition and await self.exists():
            return False
        # Once, and not before a repetition: by then the object may be there, its answer lost.
        await self._show(self._views)
        return await self._settle(self._put_object)

    async def put_parts(self, size: int) -> bool:
        """Store the object in parts of `size` bytes; return False where the key exists.

        Not every server checks a condition at the end of parts, so it is looked at first as well:
        of two that create one large object at once, both may be told that they did.
        """
        if self._create and await self.exists():
            return False
        upload = await self._begin()
        try:
            parts = await self._put_all(upload, size)
            stored = await self._settle(partial(self._complete, upload, parts))
            if stored:
                await self._check_whole()
        except BaseException:
            # Also when the caller was interrupted: parts cost money until they are aborted.
            await asyncio.shield(self._abort(upload))
            raise
        # Its parts would be paid for until a sweep that comes a day later.
        if not stored:
            await self._abort(upload)
        return stored

    async def _put_all(self, upload: dict[str, str], size: int) -> list[Answer]:
        """Send all parts; return what the server answered, in their order."""
        return await together(
            (
                partial(self._put_part, upload, number, cut_parts(self._views, start, stop))
                for number, (start, stop) in enumerate(spans(self.nbytes, size), 1)
            ),
            at_once=self._client.concurrency,
        )

    async def probe(self) -> bool:
        """Return whether the server refuses to create again what `put_whole` just created."""
        try:
            await self._client.repeat(self._put_object)
        except FOREIGN as error:
            if code_of(error) in EXISTS:
                return True
            raise
        return False

    async def exists(self) -> bool:
        """Return whether there is an object under the key."""
        try:
            await self._client.call("head_object", **self._target)
        except FOREIGN as error:
            if code_of(error) in NO_SUCH_OBJECT:
                return False
            raise
        return True

    async def _settle(self, request: Callable[[], Awaitable[object]]) -> bool:
        """Make the request that lets the object appear; find out what happened if it is unclear."""
        doubt = False

        async def attempt() -> bool:
            nonlocal doubt
            try:
                await request()
            except FOREIGN as error:
                code = code_of(error)
                # Refused since it is there: after a lost answer that may be our own doing.
                gone_or_there = code in EXISTS | NO_SUCH_UPLOAD
                if gone_or_there and doubt and await self._is_ours():
                    return True
                if code in EXISTS:
                    return False
                doubt = True
                raise
            return True

        try:
            return await self._client.repeat(attempt)
        except FOREIGN as error:
            # Given up and not refused: the last request may have taken effect all the same.
            if judge(error) is not Verdict.FINAL and await self._is_ours():
                return True
            raise

    async def _is_ours(self) -> bool:
        with suppress(*FOREIGN):
            # Not by `call`: an attempt that asks holds a place at the gate, and where there is only
            # one it would wait for itself.
            answer = await self._client.once("head_object", self._target)
            return bool(answer.get("Metadata", {}).get(_MARK) == self._mark[_MARK])
        return False

    async def _put_object(self) -> None:
        await self._send("put_object", self._views, Metadata=self._mark, **self._condition)

    async def _put_part(
        self, upload: dict[str, str], number: int, views: list[memoryview]
    ) -> Answer:
        async def attempt() -> Answer:
            await self._show(views)
            return await self._send("upload_part", views, PartNumber=number, **upload)

        answer = await self._client.repeat(attempt)
        names = ("ETag", "ChecksumCRC32") if self._client.checksums else ("ETag",)
        return {"PartNumber": number, **{name: answer[name] for name in names if name in answer}}

    async def _show(self, views: Sequence[memoryview]) -> None:
        """Let the watch see `views` and, if it raises, end what it is part of."""
        nbytes = sum(view.nbytes for view in views)
        if self._watch is not None and nbytes:
            await asyncio.to_thread(self._watch, nbytes)

    async def _send(self, name: str, views: Sequence[memoryview], **parameters: Any) -> Answer:
        if self._client.checksums:
            parameters["ChecksumCRC32"] = await asyncio.to_thread(crc32, views)
        async with stall_watch(self._client.stall_seconds) as progress:
            # A body that holds nothing would count as none at all.
            body = Body(views, progress) if any(view.nbytes for view in views) else b""
            return await self._client.send(name, {**self._target, **parameters, "Body": body})

    async def _begin(self) -> dict[str, str]:
        parameters: dict[str, Any] = {**self._target, "Metadata": self._mark}
        if self._client.checksums:
            parameters["ChecksumAlgorithm"] = "CRC32"
        attempts = 0

        async def attempt() -> str:
            nonlocal attempts
            attempts += 1
            # By `once`, as this runs inside an attempt that is repeated and counted.
            answer = await self._client.once("create_multipart_upload", parameters)
            return str(answer["UploadId"])

        try:
            upload = await self._client.repeat(attempt)
        except FOREIGN as error:
            if judge(error) is not Verdict.FINAL:
                await self._abort_strays(keep="")
            raise
        if attempts > 1:
            await self._abort_strays(keep=upload)
        return {"UploadId": upload}

    async def _abort_strays(self, *, keep: str) -> None:
        """Abort what was begun by requests whose answers were lost."""
        with suppress(*FOREIGN):
            answer = await self._client.call(
                "list_multipart_uploads",
                Bucket=self._target["Bucket"],
                Prefix=self._target["Key"],
            )
            for found in answer.get("Uploads", []):
                upload = {"UploadId": found["UploadId"]}
                if found["Key"] != self._target["Key"] or found["UploadId"] == keep:
                    continue
                held = await self._client.call("list_parts", **self._target, **upload)
                # A stray never gets a part; what has one is somebody's who is at work.
                if not held.get("Parts"):
                    await self._abort(upload)

    async def _complete(self, upload: dict[str, str], parts: list[Answer]) -> None:
        await self._client.once(
            "complete_multipart_upload",
            {
                "MultipartUpload": {"Parts": parts},
                **self._target,
                **upload,
                **self._condition,
            },
            patience=_COMPLETE_PATIENCE,
        )

    async def _check_whole(self) -> None:
        """Compare the size of what is stored with what was sent."""
        answer: Answer = {"ContentLength": self.nbytes}
        # The server said that it is stored: an outage since then changes nothing about that.
        with suppress(*FOREIGN):
            answer = await self._client.call("head_object", **self._target)
        if answer["ContentLength"] == self.nbytes:
            return
        # What somebody put in its place since is not ours to delete.
        if await self._is_ours():
            await self._client.call("delete_object", **self._target)
        raise Truncated(f"{answer['ContentLength']} of {self.nbytes} bytes were stored")

    async def _abort(self, upload: dict[str, str]) -> None:
        # Until it is gone: a part that was on its way may arrive after the first abort. What an
        # outage leaves all the same is for `sweep`; the error of the put is what to report.
        with suppress(*FOREIGN):
            for _ in range(_ABORTS):
                await self._client.call("abort_multipart_upload", **self._target, **upload)


# An object on its way to S3 while it is made: a few parts of it are in memory at a time.


# Each is a part in memory; one more is being made.
_PARTS_AT_ONCE = 4


class StreamUpload(Upload):
    """One attempt to store what `stream` makes, in parts."""

    def __init__(
        self,
        client: Client,
        target: dict[str, str],
        stream: Stream,
        *,
        create: bool,
        conditional: bool,
    ) -> None:
        super().__init__(client, target, (), create=create, conditional=conditional)
        self.nbytes = stream.nbytes
        self._stream = stream

    async def _put_all(self, upload: dict[str, str], size: int) -> list[Answer]:
        views = _Cutter(iter(self._stream))
        pending = iter(enumerate(spans(self.nbytes, size), 1))
        # A stream is made in order, so one task at a time takes from it; all send side by side.
        one_makes = asyncio.Lock()

        async def work() -> list[Answer]:
            done: list[Answer] = []
            while True:
                async with one_makes:
                    number, (start, stop) = next(pending, (0, (0, 0)))
                    if not number:
                        return done
                    # Off the event loop: it may itself be what reads the source.
                    part = await asyncio.to_thread(views.take, stop - start)
                done.append(await self._put_part(upload, number, part))

        at_once = min(_PARTS_AT_ONCE, self._client.concurrency)
        answers = await together([work] * at_once, at_once=at_once)
        # The server refuses a list that does not ascend, and tasks end in any order.
        return sorted((each for some in answers for each in some), key=_number)


class _Cutter:
    """Takes bytes from the front of what comes in views of any size."""

    def __init__(self, views: Iterator[memoryview]) -> None:
        self._views = views
        self._rest = memoryview(b"")

    def take(self, nbytes: int) -> list[memoryview]:
        """Return views of the next `nbytes`."""
        taken: list[memoryview] = []
        while nbytes:
            self._rest = self._rest or next(self._views, self._rest)
            if not self._rest:  # no StopIteration, which no future can hold
                raise EOFError(f"a stream ended {nbytes} bytes before its end")
            taken.append(self._rest[:nbytes])
            self._rest = self._rest[nbytes:]
            nbytes -= taken[-1].nbytes
        return taken


def _number(part: Answer) -> int:
    return int(part["PartNumber"])


# Ranges of one object of S3, read at once, each straight to its place.


# As large as what peers ask for at once: less costs processor time for each request.
PIECE_BYTES = 16 * MIB
"""How much of an object one request reads, at most."""

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
        # Forgotten, so that the first answer of this attempt says which version is read.
        self._version = None
        pieces = spans(self._into.nbytes, PIECE_BYTES)
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
                        # Otherwise a server that sends too much would overwrite the next piece.
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
        # Size and tag together: every piece has to be of one version, which no single answer shows.
        if self._version not in (None, version):
            raise Changed("it was replaced while it was read")
        self._version = version
