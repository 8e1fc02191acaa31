"""An object on its way to S3 while it is made: a few parts of it are in memory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from dist_ckpt.storage.multipart import spans
from dist_ckpt.storage.s3_client import Answer, Client, together
from dist_ckpt.storage.s3_upload import Upload
from dist_ckpt.storage.stream import Stream

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
