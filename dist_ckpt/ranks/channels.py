"""Frames over sockets that never block: one thread serves all connections of this process.

Whoever sends only leaves a note for that thread and never touches a socket, so that an interrupt
cannot tear a frame in two, and a peer that accepts nothing holds up nobody.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Literal

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import describe
from dist_ckpt.ranks.seals import SEAL_BYTES, Packed, Seals, with_digest
from dist_ckpt.threads import start

_log = logging.getLogger("dist_ckpt")

# A frame is its length in four bytes, its seal once the ends have greeted, and so much.
_LENGTH_BYTES = 4
# So short, a frame is copied behind its length and its seal, to leave at once with them.
_JOINED_BYTES = 1 << 12
FRAME_LIMIT_BYTES = (1 << 32) - 1
"""How long a frame may be. Memory for one is taken as its bytes arrive, and not before."""

MESSAGE_LIMIT_BYTES = FRAME_LIMIT_BYTES - (1 << 16)
"""How long a message or an answer may be: that and its frame."""

FrameKind = Literal["report", "fail", "note", "leave", "answer", "first", "here"]

# So much of one connection at a time, so that those with little to say get their turn.
_TURN_BYTES = 1 << 18

SILENCE_SECONDS = 300.0
"""How long a host may say nothing, at most, until it counts as gone."""

# The kernel asks idle connections for a sign of life by itself, so that one is missed, and what
# forgets idle connections is reminded of this one.
_PROBES = 9


@decodable
class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What one end says to the other.

    Attributes:
        kind: to rank 0: "report" a message to a round, "fail" a round, put up a "note", "leave" the
            job. From rank 0: the "answer" of a round, or that it did "fail"; a "note"; that rank 0
            did "leave"; that the rank is the "first" in a round to which rank 0 has not come, and
            that rank 0 is "here" then.
        job: the number of the job.
        name: of the round, or of the note.
        data: the message, the answer, the note, or the error as `errors.to_wire` puts it.
    """

    kind: FrameKind
    job: int
    name: str = ""
    data: bytes = b""


_decoder = msgspec.msgpack.Decoder(Frame)


def packed(frame: Frame) -> Packed:
    """Return `frame` as channels send it."""
    return with_digest(msgspec.msgpack.encode(frame))


def framed(body: bytes, seal: bytes = b"") -> bytes:
    """Return `body` with its length and its seal before it."""
    return len(body).to_bytes(_LENGTH_BYTES, "big") + seal + body


def unpacked(body: bytes) -> Frame:
    """Return the frame that `packed` put together.

    Raises:
        msgspec.DecodeError: `body` is no frame.
    """
    return _decoder.decode(body)


def receive(connection: socket.socket, limit_bytes: int) -> bytes:
    """Return the next frame of a socket that blocks, as one does while it is being set up.

    Raises:
        OSError: the connection ended, or took too long, or the frame is longer than `limit_bytes`.
    """
    size = int.from_bytes(_receive_exactly(connection, _LENGTH_BYTES), "big")
    if size > limit_bytes:
        raise ConnectionError(f"a frame of {size} bytes where at most {limit_bytes} can come")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = connection.recv(size - len(found))
        if not piece:
            raise ConnectionError("the other side closed the connection")
        found += piece
    return found


def set_options(connection: socket.socket, silence_seconds: float) -> None:
    """Have small frames leave at once, and a host that has gone without a word be noticed."""
    # The first probe and those after it fill the span, so that either way of noticing ends with it.
    first = max(1, round(silence_seconds / 4))
    every = max(1, round((silence_seconds - first) / _PROBES))
    options = {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": first,
        "TCP_KEEPINTVL": every,
        "TCP_KEEPCNT": _PROBES,
        # The same for what was sent to it and is not acknowledged.
        "TCP_USER_TIMEOUT": round(1000 * silence_seconds),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Loop:
    """The thread that waits for all sockets of this process at once.

    What it calls must be short. Everything but `call` is for that thread alone.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._selector = DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._selector.register(self._ear, EVENT_READ, self._wake)
        self.scratch = bytearray(_TURN_BYTES)
        start(threading.Thread(target=self._run, name="dist_ckpt-rounds", daemon=True))

    def call(self, work: Callable[[], None]) -> None:
        """Have `work` called on the thread, after what was asked for before; from any thread."""
        # Single operations, which neither threads nor interrupts see half done.
        self._calls.append(work)
        with suppress(OSError):  # full: it is being woken already. Closed: in a forked child
            self._mouth.send(b"\0")

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Have `work` called in so many seconds."""
        # The number settles what is due at one time, as calls cannot be compared.
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), work))

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready` whenever `sock` is ready for some of `events`; for none of them, never."""
        known = sock in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(sock)
        elif known:
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the parent's connections, else they outlive the parent."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        # Only closed: what is taken out of the selector here would be taken out of the parent's.
        self._selector.close()
        self._mouth.close()

    def _wake(self, _: int) -> None:
        # However many bytes there are: all that was asked for is looked at afterwards.
        self._ear.recv(1 << 12)

    def _run(self) -> None:
        while True:
            timeout = self._later[0][0] - time.monotonic() if self._later else None
            for key, events in self._selector.select(timeout):
                self._guarded(partial(key.data, events))
            # Those of now: work that asks for more work must not keep the sockets waiting.
            for _ in range(len(self._calls)):
                self._guarded(self._calls.popleft())
            while self._later and self._later[0][0] <= time.monotonic():
                self._guarded(heapq.heappop(self._later)[2])

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # of one connection, and no reason to let down all the others
            _log.exception("a connection between ranks failed")


class Channel:
    """One connection, as the loop serves it. All of it is for the thread of the loop alone.

    Attributes:
        on_body: called with each frame that arrives, without its length.
        on_lost: called once with the reason when the connection breaks; not after `close`.
        limit_bytes: how long a frame may be.
        seals: of all frames that follow; None for as long as the ends greet each other.
        is_open: whether it was neither closed nor lost.
        newest: what has not left yet of `send_newest`, by name.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        *,
        on_body: Callable[[bytes], None],
        on_lost: Callable[[str], None],
        limit_bytes: int = FRAME_LIMIT_BYTES,
        seals: Seals | None = None,
    ) -> None:
        """Begin to listen.

        Args:
            loop: serves it.
            connection: what it speaks over.
            on_body: see the attributes, as for what follows.
            on_lost: when it breaks.
            limit_bytes: for each frame.
            seals: of the frames.
        """
        connection.setblocking(False)
        self.on_body = on_body
        self.on_lost = on_lost
        self.limit_bytes = limit_bytes
        self.seals = seals
        self.is_open = True
        self._loop = loop
        self._socket = connection
        self._received = bytearray()
        self._queue: deque[memoryview] = deque()
        self.newest: dict[str, Packed] = {}
        self._when_sent: list[Callable[[], None]] = []
        self._events = 0
        # What the peer has no ear for any more; what it said before is still to be heard.
        self._is_deaf = False
        self._watch()

    def send(self, frame: Packed) -> None:
        """Send a frame; many channels may share one."""
        if self.is_open and not self._is_deaf:
            self._put(frame)
            self._flush()

    def send_newest(self, name: str, frame: Packed) -> None:
        """Send a frame in the place of the one of that name which has not left yet."""
        if self.is_open and not self._is_deaf:
            self.newest[name] = frame
            self._flush()

    def when_sent(self, work: Callable[[], None]) -> None:
        """Call `work` when all has left, or never can."""
        self._when_sent.append(work)
        self._flush()

    def close(self) -> None:
        """Close the connection."""
        if self.is_open:
            self.is_open = False
            self._loop.watch(self._socket, 0, self._ready)
            self._socket.close()
            self._forget_queue()

    def lose(self, reason: str) -> None:
        """Close the connection as one that broke."""
        if self.is_open:
            self.close()
            self.on_lost(reason)

    def _put(self, frame: Packed) -> None:
        # Sealed here and not before: frames leave in this order.
        seal = self.seals.next(frame.digest) if self.seals else b""
        if len(frame.body) <= _JOINED_BYTES:
            self._queue.append(memoryview(framed(frame.body, seal)))
        else:
            head = len(frame.body).to_bytes(_LENGTH_BYTES, "big") + seal
            self._queue.extend((memoryview(head), memoryview(frame.body)))

    def _forget_queue(self) -> None:
        self._queue.clear()
        self.newest.clear()
        while self._when_sent:
            self._when_sent.pop()()

    def _watch(self) -> None:
        events = EVENT_READ | (EVENT_WRITE if self._queue else 0)
        if events != self._events:
            self._events = events
            self._loop.watch(self._socket, events, self._ready)

    def _ready(self, events: int) -> None:
        if events & EVENT_WRITE and self.is_open:
            self._flush()
        if events & EVENT_READ and self.is_open:
            self._receive()

    def _flush(self) -> None:
        while self.is_open and (self._queue or self.newest):
            if not self._queue:
                self._put(self.newest.pop(next(iter(self.newest))))
            waiting = self._queue[0]
            try:
                sent = self._socket.send(waiting[:_TURN_BYTES])
            except BlockingIOError:
                break
            except OSError:
                # The end is found by reading, after all that was said before: that it leaves, say.
                self._is_deaf = True
                self._forget_queue()
                break
            if sent < len(waiting):
                self._queue[0] = waiting[sent:]
                break  # it has had its turn
            self._queue.popleft()
        if self.is_open:
            self._watch()
        if not self._queue:
            self._forget_queue()

    def _receive(self) -> None:
        scratch = self._loop.scratch
        try:
            count = self._socket.recv_into(scratch)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(describe(error))
            return
        if not count:
            self.lose("the other side closed the connection")
            return
        with memoryview(scratch) as view:
            self._received += view[:count]
        try:
            self._take_frames()
        except Exception as error:  # not of ours, or a mistake of ours: this connection is at fault
            self.lose(f"what it sent cannot be understood ({describe(error)})")

    def _take_frames(self) -> None:
        taken = 0
        # Let go before the bytes are cut off: what is looked at cannot be resized.
        with memoryview(self._received) as view:
            while self.is_open and len(view) - taken >= _LENGTH_BYTES:
                sealed = taken + _LENGTH_BYTES
                begin = sealed + (SEAL_BYTES if self.seals else 0)
                size = int.from_bytes(view[taken:sealed], "big")
                # By its length alone, before memory is taken for what a stranger claims.
                if size > self.limit_bytes:
                    raise ValueError(f"a frame of {size} bytes")
                if len(view) - begin < size:
                    break
                taken = begin + size
                body = bytes(view[begin:taken])
                if self.seals:
                    self.seals.check(bytes(view[sealed:begin]), body)
                self.on_body(body)
        del self._received[:taken]


_lock = threading.Lock()
_loops: dict[int, Loop] = {}


def running_loop() -> Loop:
    """Return the loop of this process, started at the first call."""
    with _lock:
        found = _loops.get(os.getpid())
        if found is None:
            found = _loops[os.getpid()] = Loop()
    return found


def _forget_in_child() -> None:
    _lock.release()
    for loop in _loops.values():
        loop.forget_after_fork()
    _loops.clear()


# Held over a fork, so that the child never finds it locked by a thread that it does not have.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_in_child
)
