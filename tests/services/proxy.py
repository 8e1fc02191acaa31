"""An HTTP proxy before an S3 server that spoils chosen requests, as networks and servers do."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    Attributes:
        kind: `answer` with an error of the server's, which never sees the request; `reset` the
            connection before the server sees it, or `lose` the answer by a reset after it was
            done; `stall`: take the request and never answer; `truncate` the answer's body, or its
            head where it has no body.
        status: of `answer`.
        code: of `answer`, as S3 names it.
    """

    kind: Literal["answer", "reset", "lose", "stall", "truncate"]
    status: int = 0
    code: str = ""

    def __str__(self) -> str:
        return self.code or self.kind


SLOW_DOWN = Fault("answer", 503, "SlowDown")
INTERNAL = Fault("answer", 500, "InternalError")
RESET, LOSE, STALL, TRUNCATE = (Fault(k) for k in ("reset", "lose", "stall", "truncate"))
FAULTS = (SLOW_DOWN, INTERNAL, RESET, LOSE, STALL, TRUNCATE)


@dataclass(frozen=True)
class Head:
    """The head of a request or an answer: its first line, and the headers in lower case."""

    raw: bytes
    first: str
    headers: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Size of the body where the head names it."""
        return int(self.headers.get("content-length", 0))

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks that name their sizes."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()


class FaultProxy:
    """The proxy, running in a thread of its own between `with` and its end.

    Attributes:
        endpoint: where clients reach it.
        requests: what came since the last `arm`, each as `PUT /bucket/key?query`.
        fired: how often the fault happened since then.
    """

    def __init__(self, upstream: str, host: str = "127.0.0.1") -> None:
        parts = urlsplit(upstream)
        self._host = host
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._loop = asyncio.new_event_loop()
        self._serving: set[asyncio.Task[None] | None] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.endpoint = ""
        self.arm(None)

    def arm(
        self,
        fault: Fault | None,
        *,
        at: int = 0,
        match: str = "",
        then: Literal["nothing", "equal", "all"] = "nothing",
    ) -> None:
        """Choose what goes wrong from now on, and begin to count anew.

        Args:
            fault: what happens; None: nothing.
            at: to which request, counted from 1; 0: to every one that `match` is in.
            match: a part of `METHOD /bucket/key?query`.
            then: to which requests after number `at` it happens too: `equal` ones, so that no
                number of retries helps, or `all`, as when the server is gone.
        """
        self._fault, self._at, self._match, self._then = fault, at, match, then
        self._doomed = ""
        self.requests: list[str] = []
        self.fired = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, self._host, 0))
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://{self._host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _end(self) -> None:
        self._server.close()
        # By the loop and until there is none: some connections are accepted, but not begun yet.
        while sessions := asyncio.all_tasks() - {asyncio.current_task()}:
            for session in sessions:
                session.cancel()
            await asyncio.gather(*sessions, return_exceptions=True)

    def _choose(self, request: str) -> Fault | None:
        self.requests.append(request)
        behind = len(self.requests) - self._at
        if self._at:
            again = self._then == "all" or (self._then == "equal" and request == self._doomed)
            hit = behind == 0 or (behind > 0 and again)
        else:
            hit = self._match in request
        if self._fault is None or not hit:
            return None
        self._doomed = self._doomed or request
        self.fired += 1
        return self._fault

    async def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        writers = [writer]
        # asyncio itself keeps no hold on what serves a connection: it could be collected half-way.
        serving = asyncio.current_task()
        self._serving.add(serving)
        try:
            upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
            writers.append(upstream[1])
            while await self._exchange((reader, writer), upstream):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one side is gone: so is the other
        finally:
            self._serving.discard(serving)
            for each in writers:
                each.transport.abort()

    async def _exchange(
        self, client: tuple[StreamReader, StreamWriter], server: tuple[StreamReader, StreamWriter]
    ) -> bool:
        """Pass one request and its answer on; return whether the connection is still good."""
        head = await _read_head(client[0])
        if head is None:
            return False
        method, target, _ = head.first.split(" ", 2)
        fault = self._choose(f"{method} {target}")
        kind = fault.kind if fault else ""
        if kind == "reset":
            _reset(client[1])
            return False
        if head.headers.get("expect"):
            client[1].write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault and kind in ("answer", "stall"):
            await _copy_body(client[0], None, head)
            if kind == "answer":
                client[1].write(_error(fault, with_body=method != "HEAD"))
                return True
            await client[0].read()  # until the client gives up
            return False
        server[1].write(_without_expect(head))
        await _copy_body(client[0], server[1], head)
        answer = await _read_head(server[0])
        if answer is None:
            return False
        bare = method == "HEAD" or answer.first.split(" ")[1] in ("204", "304")
        if fault:
            body = b"" if bare else await _read_body(server[0], answer)
            if kind == "truncate":
                # Some clients take a head that ends early for a whole one, so it ends very early.
                client[1].write(answer.raw + body[: len(body) // 2] if body else answer.raw[:5])
                await client[1].drain()
            else:
                _reset(client[1])
            return False
        client[1].write(answer.raw)
        if not bare:
            await _copy_body(server[0], client[1], answer)
        await client[1].drain()
        return "close" not in answer.headers.get("connection", "").lower()


async def _read_head(reader: StreamReader) -> Head | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Head(raw, first, {name.lower(): value.strip() for name, _, value in pairs})


async def _copy_body(reader: StreamReader, writer: StreamWriter | None, head: Head) -> None:
    """Pass the body on as it comes; without `writer` it is dropped."""
    if head.chunked:
        await _write(writer, await _read_body(reader, head))
        return
    left = head.nbytes
    while left:
        data = await reader.read(min(left, _CHUNK_BYTES))
        if not data:
            raise EOFError
        left -= len(data)
        await _write(writer, data)


async def _read_body(reader: StreamReader, head: Head) -> bytes:
    """Return the body as it is on the wire, with the sizes of its chunks."""
    if not head.chunked:
        return await reader.readexactly(head.nbytes)
    body = bytearray()
    while True:
        line = await reader.readline()
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if not size:
            return bytes(body)


async def _write(writer: StreamWriter | None, data: bytes) -> None:
    if writer is not None:
        writer.write(data)
        await writer.drain()


def _without_expect(head: Head) -> bytes:
    # The proxy has said "continue" itself; a second one from the server would be in the way.
    lines = head.raw.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(b"expect:"))


def _error(fault: Fault, *, with_body: bool) -> bytes:
    text = f"<Error><Code>{fault.code}</Code><Message>{fault.code} on purpose</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    head = f"HTTP/1.1 {fault.status} {fault.code}\r\nContent-Type: application/xml\r\n"
    if fault.status == 301:
        head += "x-amz-bucket-region: eu-central-1\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + (body if with_body else b"")


def _reset(writer: StreamWriter) -> None:
    # Closing with a linger of zero seconds sends RST instead of FIN.
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
