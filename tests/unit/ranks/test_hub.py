"""The port of rank 0: strangers, peers that accept nothing, forks, and the limits of the system."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks import hub as hub_module
from dist_ckpt.ranks.addresses import listening
from dist_ckpt.ranks.channels import Channel, Frame, framed, packed, receive, running_loop
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.greeting import (
    GREETING_LIMIT_BYTES,
    Hello,
    challenge,
    hello,
    proof,
    seals,
)
from dist_ckpt.ranks.hub import Hub, allow_files
from dist_ckpt.ranks.rendezvous import Address, connect
from dist_ckpt.ranks.rounds import Decide
from dist_ckpt.threads import Latch
from tests.unit.ranks.rounds import hub_of, line_to, long, on_every_rank, topic

WORLD = 3


def total(messages: Sequence[bytes]) -> bytes:
    return b"|".join(messages)


def agreed(job: Sequence[JobCoordinator], key: str, decide: Decide) -> list[object]:
    """Return what members of a job are answered."""
    works = [partial(each.round, topic(key), b"x", decide, deadline=long()) for each in job]
    return list(on_every_rank(works))


def agree(hub: Hub, others: Sequence[JobCoordinator], key: str = "round") -> None:
    """Have a job agree, whatever else is connected."""
    job = [JobCoordinator(hub), *others]
    assert agreed(job, key, total) == [b"|".join([b"x"] * len(job))] * len(job)


def plain(hub: Hub) -> socket.socket:
    """Return a connection that has said nothing, and that gives up in time."""
    found = socket.create_connection(("127.0.0.1", hub.port))
    found.settimeout(60)
    return found


def is_turned_away(connection: socket.socket) -> bool:
    """Wait until rank 0 has closed the connection."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        framed(b""),
        framed(b"garbage"),
        framed(bytes(GREETING_LIMIT_BYTES)),
        framed(msgspec.msgpack.encode((1, b"nonce", b"proof"))),
        b"\xff" * 1000,
    ],
)
def test_a_stranger_is_turned_away_and_nobody_else_notices(said: bytes) -> None:
    hub = hub_of(WORLD)
    with closing(plain(hub)) as stranger, closing(plain(hub)) as mute:
        stranger.sendall(said)
        assert is_turned_away(stranger)
        agree(hub, [JobCoordinator(line_to(hub, rank)) for rank in (1, 2)])
        assert mute.recv(1 << 16), "it is asked who it is"


@pytest.mark.parametrize(
    ("rank", "world_size", "secret"),
    [
        (1, WORLD, bytes(32)),
        (0, WORLD, None),
        (WORLD, WORLD, None),
        (-1, WORLD, None),
        (1, 2, None),
    ],
)
def test_who_is_none_of_the_job_is_turned_away(
    rank: int, world_size: int, secret: bytes | None
) -> None:
    hub = hub_of(WORLD)
    with closing(plain(hub)) as connection:
        asked = receive(connection, GREETING_LIMIT_BYTES)
        said = hello(rank, world_size, secret or hub.secret, asked)
        connection.sendall(framed(msgspec.msgpack.encode(said)))
        assert is_turned_away(connection)


def test_a_greeting_that_was_overheard_opens_no_second_connection() -> None:
    hub = hub_of(WORLD)
    with closing(plain(hub)) as first, closing(plain(hub)) as second:
        said = hello(1, WORLD, hub.secret, receive(first, GREETING_LIMIT_BYTES))
        receive(second, GREETING_LIMIT_BYTES)
        second.sendall(framed(msgspec.msgpack.encode(said)))
        assert is_turned_away(second)


def test_strangers_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "STRANGERS_LIMIT", 2)
    hub = hub_of(WORLD)
    with closing(plain(hub)) as oldest:
        others = [plain(hub) for _ in range(WORLD + 2)]
        assert is_turned_away(oldest)
        agree(hub, [JobCoordinator(line_to(hub, rank)) for rank in (1, 2)])
        for each in others:
            each.close()


def test_a_crowd_is_looked_at_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "STRANGERS_PER_SECOND", 5)
    hub = hub_of(WORLD)
    members = [JobCoordinator(line_to(hub, rank)) for rank in (1, 2)]
    with caplog.at_level(logging.WARNING, logger="dist_ckpt"):
        crowd = [plain(hub) for _ in range(10)]
        agree(hub, members)
        assert crowd[-1].recv(1 << 16), "whoever waits long enough is asked who it is"
    for each in crowd:
        each.close()
    (record,) = [each for each in caplog.records if "within a second" in each.message]
    assert f"the coordination port {hub.port} of rank 0, the last from 127.0.0.1" in record.message


def test_strangers_take_no_file_that_the_training_may_need() -> None:
    hub = hub_of(WORLD)
    lines = [line_to(hub, rank) for rank in (1, 2)]
    crowd = [plain(hub) for _ in range(hub_module.STRANGERS_LIMIT + 5)]
    assert is_turned_away(crowd[0]), "room is kept for ranks that are still to come, and no other"
    agree(hub, [JobCoordinator(line) for line in lines])
    for each in crowd:
        each.close()


def test_who_says_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "GREETING_SECONDS", 0.01)
    with closing(plain(hub_of(WORLD))) as mute:
        assert is_turned_away(mute)


def test_another_server_on_the_port_is_told_from_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        served = threading.Thread(target=_serve_another, args=(server,))
        served.start()
        address = Address(hostname="127.0.0.1", port=server.getsockname()[1], secret="00")
        with pytest.raises(CoordinationError, match=r"another server.*set MASTER_ADDR") as caught:
            connect(address, 1, 2, until=long().at)
        assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.PEER_ABSENT, [0])
        served.join()


def _serve_another(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(framed(b"another protocol"))


class RawRank:
    """A rank that was let in, of which each byte is ours; it reads nothing by itself."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.socket = plain(hub)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = receive(self.socket, GREETING_LIMIT_BYTES)
        said = hello(rank, hub.world_size, hub.secret, asked)
        self.socket.sendall(framed(msgspec.msgpack.encode(said)))
        receive(self.socket, GREETING_LIMIT_BYTES)
        self._seals = seals("rank", hub.secret, asked, said)

    def sealed(self, frame: Frame) -> bytes:
        """Return the bytes of the frame that this rank sends next."""
        body, digest = packed(frame)
        return framed(body, self._seals.next(digest))

    def close(self) -> None:
        self.socket.close()


def test_a_rank_that_accepts_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Channel] = []

    class Noted(Channel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(hub_module, "Channel", Noted)
    hub = hub_of(WORLD)
    line = line_to(hub, 1)
    first, second = JobCoordinator(hub), JobCoordinator(line)
    large = bytes(8 << 20)
    with closing(RawRank(hub, 2)) as deaf:
        for number in range(3):
            deaf.socket.sendall(deaf.sealed(Frame("report", 0, f"round-{number}", b"x")))
            assert agreed([first, second], f"round-{number}", lambda _: large) == [large] * 2
        for number in range(1000):
            first.post("word", b"%d" % number)
        assert second.wait_for(lambda: second.look("word") == b"999", long())
        # What nobody could hear is not kept a thousand times.
        _, to_the_deaf = made  # in the order in which they came
        assert to_the_deaf.newest.keys() == {"0/word"}


def test_a_message_that_comes_slowly_holds_nobody_up() -> None:
    hub = hub_of(WORLD)
    line = line_to(hub, 1)
    with closing(RawRank(hub, 2)) as slow:
        large = slow.sealed(Frame("report", 0, "large", bytes(1 << 20)))
        slow.socket.sendall(large[:-1])
        other = JobCoordinator(line)
        JobCoordinator(hub).post("word", b"1")
        assert other.wait_for(lambda: other.look("word"), long()) == b"1"
        slow.socket.sendall(large[-1:])
        job = [JobCoordinator(hub), other]
        found = agreed(job, "large", lambda messages: str(len(messages[2])).encode())
    assert found == [b"1048576"] * 2


def _made_up(rank: RawRank) -> bytes:
    return framed(packed(Frame("report", 0, "round", b"x")).body, bytes(16))


def _changed(rank: RawRank) -> bytes:
    said = rank.sealed(Frame("report", 0, "round", b"x"))
    return said[:-1] + b"y"


def _repeated(rank: RawRank) -> bytes:
    return 2 * rank.sealed(Frame("note", 0, "note", b"x"))


def _left_out(rank: RawRank) -> bytes:
    rank.sealed(Frame("note", 0, "note", b"x"))
    return rank.sealed(Frame("report", 0, "round", b"x"))


def _swapped(rank: RawRank) -> bytes:
    first = rank.sealed(Frame("note", 0, "note", b"x"))
    return rank.sealed(Frame("report", 0, "round", b"x")) + first


def _garbage(rank: RawRank) -> bytes:
    return framed(b"garbage") + bytes(16)


@pytest.mark.parametrize(
    "words",
    [_made_up, _changed, _repeated, _left_out, _swapped, _garbage],
    ids=lambda f: f.__name__,
)
def test_what_a_rank_did_not_say_or_not_now_is_not_heard(
    words: Callable[[RawRank], bytes],
) -> None:
    hub = hub_of(2)
    with closing(RawRank(hub, 1)) as broken:
        broken.socket.sendall(words(broken))
        with pytest.raises(CoordinationError, match="never will: its connection") as caught:
            JobCoordinator(hub).round(topic(), b"", total, deadline=long())
    assert caught.value.ranks == {1: "connection lost"}


def test_a_frame_of_another_connection_is_not_heard() -> None:
    hub = hub_of(WORLD)
    with closing(RawRank(hub, 1)) as one, closing(RawRank(hub, 2)) as other:
        overheard = one.sealed(Frame("report", 0, "round", b"x"))
        other.socket.sendall(overheard)
        assert is_turned_away(other.socket)
        one.socket.sendall(overheard)
        JobCoordinator(hub).post("here", b"")
        assert JobCoordinator(hub).wait_for(lambda: hub.board.count(0, "round") == 1, long())


def test_a_rank_believes_nothing_that_rank_0_did_not_say() -> None:
    secret, ours = bytes(32), socket.create_server(("127.0.0.1", 0))
    with closing(ours):
        served = threading.Thread(target=_serve_forged, args=(ours, secret))
        served.start()
        address = Address(hostname="127.0.0.1", port=ours.getsockname()[1], secret=secret.hex())
        member = JobCoordinator(connect(address, 1, 2, until=long().at))
        with pytest.raises(CoordinationError, match=r"cannot be understood.*without its seal"):
            member.round(topic(), b"x", total, deadline=long())
        served.join()


def _serve_forged(server: socket.socket, secret: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        asked = challenge()
        connection.sendall(framed(asked))
        said = msgspec.msgpack.decode(receive(connection, GREETING_LIMIT_BYTES), type=Hello)
        connection.sendall(framed(proof("hub", secret, asked, said)))
        # From here on somebody on the way, who knows what is said and not the secret.
        answer = packed(Frame("answer", 0, "round", b"forged"))
        connection.sendall(framed(answer.body, bytes(16)))
        is_turned_away(connection)


def test_what_a_rank_says_before_it_goes_is_heard() -> None:
    hub = hub_of(2)
    with closing(RawRank(hub, 1)) as going:
        for number in range(100):  # which it never reads: its end of the connection is reset
            JobCoordinator(hub).post(f"note {number}", bytes(1000))
        going.socket.sendall(going.sealed(Frame("leave", 0)))
    with pytest.raises(CoordinationError, match="it closed its Checkpointer") as caught:
        JobCoordinator(hub).round(topic(), b"", total, deadline=long())
    assert caught.value.ranks == {1: "left before"}


def test_a_second_connection_of_a_rank_takes_the_place_of_the_first() -> None:
    hub = hub_of(2)
    with closing(RawRank(hub, 1)) as first:
        line = line_to(hub, 1)
        assert is_turned_away(first.socket)
        agree(hub, [JobCoordinator(line)])


def test_who_has_spoken_comes_no_second_time() -> None:
    """A rank of another start of the job, that finds the address of this one in an old store."""
    hub = hub_of(2)
    line = line_to(hub, 1)
    agree(hub, [JobCoordinator(line)])
    with closing(plain(hub)) as late:
        said = hello(1, 2, hub.secret, receive(late, GREETING_LIMIT_BYTES))
        late.sendall(framed(msgspec.msgpack.encode(said)))
        assert is_turned_away(late)
    agree(hub, [JobCoordinator(line)], "next")


def test_a_forked_child_does_not_keep_the_connections_of_its_parent() -> None:
    hub = hub_of(2)
    line = line_to(hub, 1)
    gone, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(told)
        os.read(gone, 1)  # until the parent has seen enough
        os._exit(0)
    try:
        other = JobCoordinator(line)
        agree(hub, [other])
        del hub  # the child is there, and yet the connection ends
        with pytest.raises(CoordinationError, match="connection to rank 0 was lost"):
            other.round(topic("next"), b"", total, deadline=long())
    finally:
        os.close(told)
        os.waitpid(pid, 0)
        os.close(gone)


def test_a_forked_child_has_a_loop_of_its_own() -> None:
    hub_of(2)
    pid = os.fork()
    if not pid:
        try:
            hub = hub_of(2)
            agree(hub, [JobCoordinator(line_to(hub, 1))])
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("loopback", [True, False])
def test_no_more_is_listened_to_than_must_be(
    loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    (found,) = listening(loopback=loopback)
    with found:
        address = found.getsockname()[0]
        assert (address == "127.0.0.1") is loopback
        if not loopback:
            assert address in ("::", "0.0.0.0")
            port = found.getsockname()[1]
            socket.create_connection(("127.0.0.1", port)).close()


def test_where_the_training_has_a_loopback_interface_no_other_is_listened_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback_name())
    (found,) = listening(loopback=False)
    with found:
        assert found.getsockname()[0] == "127.0.0.1"


def loopback_name() -> str:
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))


def test_ranks_come_by_ipv6() -> None:
    hub = Hub(2)
    try:
        socket.create_connection(("::1", hub.port)).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    address = Address(hostname="::1", port=hub.port, secret=hub.secret.hex())
    agree(hub, [JobCoordinator(connect(address, 1, 2, until=long().at))])


@pytest.fixture
def file_limits() -> Iterator[tuple[int, int]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_of_open_files_is_raised_when_the_world_needs_it(
    file_limits: tuple[int, int],
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, file_limits[1]))
    allow_files(8)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024, "of itself it is left alone"
    allow_files(1024)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024


def test_a_limit_that_cannot_be_raised_is_named_with_what_to_do() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit")
    with pytest.raises(CoordinationError, match=rf"{hard} open files.*ulimit -Hn") as caught:
        Hub(hard + 1)
    assert list(caught.value.ranks) == [0]


def test_a_rank_that_cannot_be_let_in_for_want_of_files_is_let_in_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PAUSE_SECONDS", 0.01)
    refused = Latch()

    class Full:
        """The listener of a process that has no file left, a few times."""

        def __init__(self, inner: socket.socket) -> None:
            self._inner, self._left = inner, 3

        def accept(self) -> tuple[socket.socket, object]:
            if self._left:
                self._left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            refused.open()
            return self._inner.accept()

        def getsockname(self) -> Any:
            return self._inner.getsockname()

        def fileno(self) -> int:
            return self._inner.fileno()

        def close(self) -> None:
            self._inner.close()

    def listen(*, loopback: bool) -> list[Full]:
        return [Full(each) for each in listening(loopback=loopback)]

    monkeypatch.setattr(hub_module, "listening", listen)
    hub = hub_of(2)
    with caplog.at_level(logging.WARNING, logger="dist_ckpt"):
        agree(hub, [JobCoordinator(line_to(hub, 1))])
    assert refused.is_open
    (record,) = [each for each in caplog.records if "ranks cannot connect" in each.message]
    assert "RLIMIT_NOFILE" in record.message


@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
def test_frames_arrive_whole_however_they_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    over = Latch()
    loop = running_loop()

    def listen() -> None:
        Channel(loop, ours, on_body=heard.append, on_lost=lambda _: over.open())

    loop.call(listen)
    stream = b"".join(framed(body) for body in bodies)
    with theirs:
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            theirs.sendall(stream[:size])
            stream = stream[size:]
    assert over.wait(60)
    assert heard == bodies


def test_a_mistake_in_what_the_loop_calls_ends_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise LookupError("a mistake")

    running_loop().call(fail)
    hub = hub_of(2)
    agree(hub, [JobCoordinator(line_to(hub, 1))])
    assert "a mistake" in caplog.text
