"""The port of rank 0: where the other ranks connect, and prove that they are of the job."""

from __future__ import annotations

import errno
import hmac
import logging
import os
import resource
import secrets
import socket
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from selectors import EVENT_READ

import msgspec

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks.board import Board
from dist_ckpt.ranks.channels import (
    FRAME_LIMIT_BYTES,
    Channel,
    Frame,
    framed,
    running_loop,
    set_options,
    unpacked,
)
from dist_ckpt.waiting import Bell

_log = logging.getLogger("dist_ckpt")

GREETING_LIMIT_BYTES = 256
"""How long a frame may be before either side knows whom it speaks to."""

_MAGIC = b"dist_ckpt rounds 1\n"
_NONCE_BYTES = 32
_GREETING_SECONDS = 30.0
# How many may be connected that have not said yet who they are, besides one for each rank.
_STRANGERS = 64
_PAUSE_SECONDS = 0.5
# What this process may open besides while the job runs.
_SPARE_FILES = 256


# Who greets proves that it has read the secret, which rank 0 publishes in the training's own store,
# and hears the same proof. It keeps strangers out who merely find the port; frames that follow are
# neither signed nor hidden, as those of the training itself are not.


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """What a rank says first: who it is, something new, and the proof that it is one of the job."""

    rank: int
    nonce: bytes
    proof: bytes


def challenge() -> bytes:
    """Return what rank 0 says first on a connection, never the same twice."""
    return _MAGIC + secrets.token_bytes(_NONCE_BYTES)


def hello(rank: int, secret: bytes, heard: bytes) -> Hello:
    """Return the answer of `rank` to a challenge.

    Raises:
        ValueError: what was heard is no challenge: it is some other server.
    """
    if not heard.startswith(_MAGIC) or len(heard) != len(_MAGIC) + _NONCE_BYTES:
        raise ValueError("another server")
    said = Hello(rank, secrets.token_bytes(_NONCE_BYTES), b"")
    return msgspec.structs.replace(said, proof=proof("rank", secret, heard, said))


def proof(who: str, secret: bytes, heard: bytes, said: Hello) -> bytes:
    """Return what only a member of the job can say after this challenge and what a rank said.

    Args:
        who: "rank" or "hub", so that neither's word can be taken for the other's.
        secret: of the job.
        heard: the challenge.
        said: the answer, whose own proof does not count.
    """
    words = msgspec.msgpack.encode((who, heard, said.rank, said.nonce))
    return hmac.digest(secret, words, "sha256")


class Hub:
    """What rank 0 has in the place of a connection: the board, and the port where others connect.

    Attributes:
        rank: 0.
        world_size: how many ranks there are.
        board: what they have said.
        bell: rung when it is worth a look.
        secret: what a rank has to know to be let in.
        port: where it listens; the system's choice.
    """

    rank = 0

    def __init__(self, world_size: int, *, loopback: bool = False) -> None:
        """Listen.

        Args:
            world_size: how many ranks there are.
            loopback: whether all of them are on this host, so that no other need reach the port.

        Raises:
            CoordinationError: this process may not open as many connections.
        """
        allow_files(world_size)
        self.world_size = world_size
        self.bell = Bell()
        self.secret = secrets.token_bytes(_NONCE_BYTES)
        port = _Port(world_size, self.secret, self.bell, listening(loopback=loopback))
        self.board = port.board
        self.port = port.number
        self._loop = running_loop()
        self._loop.call(port.open)
        weakref.finalize(self, self._loop.call, port.close).atexit = False

    def send(self, frame: Frame) -> None:
        """Say something as rank 0."""
        self._loop.call(partial(self.board.take, 0, frame))

    def end(self, job: int, name: str, outcome: Frame | Sequence[bytes]) -> None:
        """End a round; see `Board.end`."""
        self._loop.call(partial(self.board.end, job, name, outcome))

    def name_absent(self, job: int, ranks: Collection[int]) -> None:
        """Wait for `ranks` no more when the job is left; see `Board.name_absent`."""
        self._loop.call(partial(self.board.name_absent, job, ranks))


class _Port:
    """The listening socket, and the connection of each rank."""

    def __init__(self, world_size: int, secret: bytes, bell: Bell, listener: socket.socket) -> None:
        self.board = Board(world_size, self._tell, bell)
        self.number: int = listener.getsockname()[1]
        self._world_size = world_size
        self._secret = secret
        self._listener = listener
        self._channels: dict[int, Channel] = {}
        self._strangers: dict[Channel, None] = {}
        self._loop = running_loop()
        self._has_warned = False

    def open(self) -> None:
        self._loop.watch(self._listener, EVENT_READ, self._accept)

    def close(self) -> None:
        self._loop.watch(self._listener, 0, self._accept)
        self._listener.close()
        for channel in (*self._channels.values(), *self._strangers):
            channel.close()

    def _tell(self, rank: int, data: bytes, name: str | None) -> None:
        channel = self._channels.get(rank)
        if channel is None:
            return
        if name is None:
            channel.send(data)
        else:
            channel.send_newest(name, data)

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
            set_options(connection)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._pause()
            return  # else it was gone before it was there
        asked = challenge()
        channel = Channel(
            self._loop,
            connection,
            on_body=lambda body: self._greet(channel, asked, body),
            on_lost=lambda _: self._turn_away(channel),
            limit_bytes=GREETING_LIMIT_BYTES,
        )
        self._strangers[channel] = None
        self._loop.later(_GREETING_SECONDS, lambda: self._turn_away(channel))
        if len(self._strangers) > self._world_size + _STRANGERS:
            self._turn_away(next(iter(self._strangers)))
        channel.send(framed(asked))

    def _pause(self) -> None:
        """Accept nobody for a moment: who waits to be would keep this thread awake."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning("ranks cannot connect to rank 0: %s", _too_few_files(self._world_size))
        self._loop.watch(self._listener, 0, self._accept)
        self._loop.later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self.open()

    def _turn_away(self, channel: Channel) -> None:
        if channel in self._strangers:
            del self._strangers[channel]
            channel.close()

    def _greet(self, channel: Channel, asked: bytes, body: bytes) -> None:
        said = msgspec.msgpack.decode(body, type=Hello)
        if not hmac.compare_digest(said.proof, proof("rank", self._secret, asked, said)):
            raise ValueError("it is none of the job")
        rank = said.rank
        if not 0 < rank < self._world_size:
            raise ValueError(f"rank {rank} of a job of {self._world_size}")
        del self._strangers[channel]
        earlier = self._channels.pop(rank, None)
        if earlier is not None:
            earlier.close()  # it gave that one up: it did not hear in time that it was welcome
        self._channels[rank] = channel
        channel.on_body = lambda body: self.board.take(rank, unpacked(body))
        channel.on_lost = lambda _: self._lose(rank)
        channel.limit_bytes = FRAME_LIMIT_BYTES
        channel.send(framed(proof("hub", self._secret, asked, said)))
        self.board.join(rank)

    def _lose(self, rank: int) -> None:
        del self._channels[rank]
        self.board.lose(rank)


def listening(*, loopback: bool) -> socket.socket:
    """Return a socket that listens on a free port, on no more addresses than must be."""
    # Names that rank 0 has for itself may mean loopback here and an address elsewhere, so where
    # others have to come in every address is listened to.
    tries = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")] if loopback else []
    tries += [(socket.AF_INET6, "::"), (socket.AF_INET, "")]
    for family, address in tries:
        try:
            found = socket.create_server(
                (address, 0),
                family=family,
                backlog=socket.SOMAXCONN,
                dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6(),
            )
        except OSError:  # a host without that kind of address
            continue
        found.setblocking(False)
        return found
    raise CoordinationError(
        "rank 0 cannot listen on any address of its host, so no rank can reach it",
        ranks={0: "cannot listen"},
    )


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
