"""One object on its way to S3: in one request, or in parts; marked, so that it is known again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dist_ckpt.storage.base import Watch
from dist_ckpt.storage.multipart import Body, crc32, cut, spans
from dist_ckpt.storage.s3_client import Answer, Client, stall_watch, together
from dist_ckpt.storage.s3_errors import (
    EXISTS,
    FOREIGN,
    NO_SUCH_OBJECT,
    NO_SUCH_UPLOAD,
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
            parts = await together(
                (
                    partial(self._put_part, upload, number, cut(self._views, start, stop))
                    for number, (start, stop) in enumerate(spans(self.nbytes, size), 1)
                ),
                at_once=self._client.concurrency,
            )
            stored = await self._settle(partial(self._complete, upload, parts))
            if stored:
                await self._check_whole()
        except BaseException:
            # Also when the caller was interrupted: parts cost money until they are aborted.
            await asyncio.shield(self._abort(upload))
            raise
        if not stored:
            await self._abort(upload)
        return stored

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
            if judge(error) is not Verdict.FINAL and await self._is_ours():
                return True
            raise

    async def _is_ours(self) -> bool:
        with suppress(*FOREIGN):
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
        if await self._is_ours():
            await self._client.call("delete_object", **self._target)
        raise Truncated(f"{answer['ContentLength']} of {self.nbytes} bytes were stored")

    async def _abort(self, upload: dict[str, str]) -> None:
        # Until it is gone: a part that was on its way may arrive after the first abort. What an
        # outage leaves all the same is for `sweep`; the error of the put is what to report.
        with suppress(*FOREIGN):
            for _ in range(_ABORTS):
                await self._client.call("abort_multipart_upload", **self._target, **upload)
