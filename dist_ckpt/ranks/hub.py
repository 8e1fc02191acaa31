"""The port of rank 0: where the other ranks connect, and prove that they are of the job."""

from __future__ import annotations

import errno
import hmac
import logging
import os
import resource
import secrets
import socket
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from selectors import EVENT_READ

import msgspec

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks.addresses import listening
from dist_ckpt.ranks.board import Board
from dist_ckpt.ranks.channels import (
    FRAME_LIMIT_BYTES,
    SILENCE_SECONDS,
    Channel,
    Frame,
    running_loop,
    set_options,
    unpacked,
)
from dist_ckpt.ranks.greeting import (
    GREETING_LIMIT_BYTES,
    NONCE_BYTES,
    Hello,
    challenge,
    proof,
    seals,
)
from dist_ckpt.ranks.seals import Packed, with_digest
from dist_ckpt.threads import Bell

_log = logging.getLogger("dist_ckpt")

GREETING_SECONDS = 30.0
"""How long somebody may be connected without saying who it is."""

STRANGERS_LIMIT = 64
"""How many that have not said who they are may be connected, besides the ranks still to come."""

# Each costs a part of a millisecond.
STRANGERS_PER_SECOND = 500
"""How many are looked at in a second, besides one for each rank."""

PAUSE_SECONDS = 0.5
"""How long nobody is accepted when this process has no file left for a connection."""

_SWEEP_SECONDS = 1.0
# What this process may open besides while the job runs.
_SPARE_FILES = 256


class Hub:
    """What rank 0 has in the place of a connection: the board, and the port where others connect.

    Attributes:
        rank: 0.
        world_size: how many ranks there are.
        board: what they have said.
        bell: rung when it is worth a look.
        secret: what a rank has to know to be let in.
        port: where it listens; the system's choice.
        silence_seconds: how long a host may say nothing until it counts as gone.
    """

    rank = 0

    def __init__(
        self,
        world_size: int,
        *,
        loopback: bool = False,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """Listen.

        Args:
            world_size: how many ranks there are.
            loopback: whether all of them are on this host, so that no other need reach the port.
            silence_seconds: how long a host may say nothing until it counts as gone.

        Raises:
            CoordinationError: this process may not open as many connections.
        """
        allow_files(world_size)
        self.world_size = world_size
        self.bell = Bell()
        self.secret = secrets.token_bytes(NONCE_BYTES)
        self.silence_seconds = silence_seconds
        port = _Port(self, listening(loopback=loopback))
        self.board = port.board
        self.port = port.number
        self._loop = running_loop()
        self._loop.call(port.open)
        # The port does not know the hub, so it closes with the last that uses that.
        weakref.finalize(self, self._loop.call, port.close).atexit = False

    def send(self, frame: Frame) -> None:
        """Say something as rank 0."""
        self._loop.call(partial(self.board.take, 0, frame))

    def end(self, job: int, name: str, outcome: Frame | Sequence[Packed]) -> None:
        """End a round; see `Board.end`."""
        self._loop.call(partial(self.board.end, job, name, outcome))

    def name_absent(self, job: int, ranks: Collection[int]) -> None:
        """Wait for `ranks` no more when the job is left; see `Board.name_absent`."""
        self._loop.call(partial(self.board.name_absent, job, ranks))


class Strangers:
    """Who has not greeted yet, by where it comes from."""

    def __init__(self) -> None:
        self._addresses: dict[Channel, str] = {}
        # Each with the time at which patience with it ends; in the order in which they came.
        self._by_address: dict[str, dict[Channel, float]] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def __iter__(self) -> Iterator[Channel]:
        return iter(tuple(self._addresses))

    def __contains__(self, stranger: object) -> bool:
        return stranger in self._addresses

    def add(self, stranger: Channel, address: str, patience_seconds: float) -> None:
        """Note that one has come."""
        self._addresses[stranger] = address
        until = time.monotonic() + patience_seconds
        self._by_address.setdefault(address, {})[stranger] = until

    def remove(self, stranger: Channel) -> None:
        """Note that it is none any more."""
        address = self._addresses.pop(stranger)
        others = self._by_address[address]
        del others[stranger]
        if not others:
            del self._by_address[address]

    def in_the_way(self) -> Channel:
        """Return who has to make room for others.

        It is the oldest of those from where most come: a crowd pushes out its own, and no rank of
        another host that is about to greet.
        """
        most = max(self._by_address, key=lambda address: len(self._by_address[address]))
        return next(iter(self._by_address[most]))

    def too_late(self) -> list[Channel]:
        """Return those with whom patience has ended."""
        now = time.monotonic()
        return [
            stranger
            for others in self._by_address.values()
            for stranger, until in others.items()
            if until <= now
        ]


class _Port:
    """The listening sockets, and the connection of each rank. It does not know the hub itself."""

    def __init__(self, hub: Hub, listeners: Sequence[socket.socket]) -> None:
        self.board = Board(hub.world_size, self._tell, hub.bell)
        self.number: int = listeners[0].getsockname()[1]
        self._world_size = hub.world_size
        self._secret = hub.secret
        self._silence_seconds = hub.silence_seconds
        self._listeners = list(listeners)
        self._channels: dict[int, Channel] = {}
        # Whoever has said anything never comes again: it would be a rank of another start.
        self._spoken: set[int] = set()
        self._strangers = Strangers()
        self._sweeps = False
        # How many came since when.
        self._came, self._since = 0, 0.0
        self._loop = running_loop()
        self._warned: set[str] = set()

    def open(self) -> None:
        for each in self._listeners:
            self._loop.watch(each, EVENT_READ, partial(self._accept, each))

    def close(self) -> None:
        self._rest()
        for each in self._listeners:
            each.close()
        for channel in (*self._channels.values(), *self._strangers):
            channel.close()

    def _tell(self, rank: int, data: Packed, name: str | None) -> None:
        channel = self._channels.get(rank)
        if channel is None:
            return
        if name is None:
            channel.send(data)
        else:
            channel.send_newest(name, data)

    def _accept(self, listener: socket.socket, _: int) -> None:
        try:
            connection, address = listener.accept()
            set_options(connection, self._silence_seconds)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._say("ranks cannot connect to rank 0: %s", _too_few_files(self._world_size))
                self._pause(PAUSE_SECONDS)
            return  # else it was gone before it was there
        asked = challenge()
        channel = Channel(
            self._loop,
            connection,
            on_body=lambda body: self._greet(channel, asked, body),
            on_lost=lambda _: self._turn_away(channel),
            limit_bytes=GREETING_LIMIT_BYTES,
        )
        self._strangers.add(channel, address[0], GREETING_SECONDS)
        awaited = self._world_size - 1 - len(self._channels)
        if len(self._strangers) > awaited + STRANGERS_LIMIT:
            self._turn_away(self._strangers.in_the_way())
        if not self._sweeps:
            self._sweeps = True
            self._loop.later(GREETING_SECONDS, self._sweep)
        channel.send(with_digest(asked))
        self._count(address[0])

    def _count(self, address: str) -> None:
        """Rest until the second is over once too many have come within it."""
        now = time.monotonic()
        if now - self._since > 1.0:
            self._came, self._since = 0, now
        self._came += 1
        if self._came > self._world_size + STRANGERS_PER_SECOND:
            self._say(
                "%d connections within a second to the coordination port %d of rank 0, the last "
                "from %s: it looks at no more of them in a second; let only the hosts of the job "
                "reach that port",
                *(self._came, self.number, address),
            )
            # Ranks that are there already have this thread to themselves meanwhile.
            self._pause(self._since + 1.0 - now)

    def _sweep(self) -> None:
        """Turn away who takes too long to say who it is."""
        for each in self._strangers.too_late():
            self._turn_away(each)
        self._sweeps = len(self._strangers) > 0
        if self._sweeps:
            self._loop.later(min(_SWEEP_SECONDS, GREETING_SECONDS), self._sweep)

    def _pause(self, seconds: float) -> None:
        """Accept nobody for a moment: who waits to be would keep this thread awake."""
        self._rest()
        self._loop.later(seconds, self._resume)

    def _rest(self) -> None:
        for each in self._listeners:
            self._loop.watch(each, 0, partial(self._accept, each))

    def _resume(self) -> None:
        # The pause may have outlived the port.
        if self._listeners[0].fileno() >= 0:
            self.open()

    def _say(self, text: str, *values: object) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning(text, *values)

    def _turn_away(self, stranger: Channel) -> None:
        if stranger in self._strangers:
            self._strangers.remove(stranger)
            stranger.close()

    def _greet(self, channel: Channel, asked: bytes, body: bytes) -> None:
        # Whatever is raised here ends this connection and no other: see `Channel._receive`.
        said = msgspec.msgpack.decode(body, type=Hello)
        if not hmac.compare_digest(said.proof, proof("rank", self._secret, asked, said)):
            raise ValueError("it is none of the job")
        rank = said.rank
        if not 0 < rank < self._world_size or said.world_size != self._world_size:
            raise ValueError(f"rank {rank} of {said.world_size} in a job of {self._world_size}")
        if rank in self._spoken:
            raise ValueError(f"rank {rank} of another start of the job")
        self._strangers.remove(channel)
        earlier = self._channels.pop(rank, None)
        if earlier is not None:
            earlier.close()  # it gave that one up: it did not hear in time that it was welcome
        self._channels[rank] = channel
        channel.on_body = partial(self._take, rank)
        channel.on_lost = lambda _: self._lose(rank)
        channel.limit_bytes = FRAME_LIMIT_BYTES
        # The last that goes without a seal: from the next frame on both ends have the keys.
        channel.send(with_digest(proof("hub", self._secret, asked, said)))
        channel.seals = seals("hub", self._secret, asked, said)
        self.board.join(rank)

    def _take(self, rank: int, body: bytes) -> None:
        self._spoken.add(rank)
        self.board.take(rank, unpacked(body))

    def _lose(self, rank: int) -> None:
        del self._channels[rank]
        self.board.lose(rank)


def allow_files(world_size: int) -> None:
    """Let this process have a connection to every rank, as far as the system allows it.

    Raises:
        CoordinationError: it does not.
    """
    open_files = Path("/proc/self/fd")
    used = len(os.listdir(open_files)) if open_files.exists() else _SPARE_FILES
    needed = used + world_size + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CoordinationError(
            _too_few_files(world_size), kind=ErrorKind.PEER_FAILED, ranks={0: "too few open files"}
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _too_few_files(world_size: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"rank 0 keeps a connection to each of {world_size} ranks, and its process may have at "
        f"most {min(soft, hard) if hard < 0 else hard} open files (RLIMIT_NOFILE): raise the hard "
        "limit where it is started (ulimit -Hn; LimitNOFILE= of systemd; --ulimit nofile= of a "
        "container)"
    )
