"""How ranks find rank 0: by what it publishes, or by why it could not."""

from __future__ import annotations

import resource
import socket
from functools import partial

import pytest
from torch.distributed import (  # type: ignore[attr-defined]  # public, not in its stubs
    HashStore,
    PrefixStore,
)

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks import hub as hub_module
from dist_ckpt.ranks import rendezvous
from dist_ckpt.ranks.addresses import listening
from dist_ckpt.ranks.coordinator import JobCoordinator, Line
from dist_ckpt.ranks.hub import Hub
from tests.unit.ranks.rounds import long, on_every_rank, topic


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """Give the ranks of this process a store of a training."""
    store = HashStore()
    monkeypatch.setattr(rendezvous, "training_store", lambda: store)
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return store


def joined(world_size: int) -> list[JobCoordinator]:
    found = on_every_rank(
        [
            partial(rendezvous.open_link, rank, world_size, "here", 60.0)
            for rank in range(world_size)
        ]
    )
    assert not [each for each in found if isinstance(each, BaseException)], found
    return [JobCoordinator(each) for each in found if not isinstance(each, BaseException)]


def test_all_find_rank_0_whoever_comes_first() -> None:
    job = joined(5)
    works = [partial(each.round, topic(), b"x", b"".join, deadline=long()) for each in job]
    assert on_every_rank(works) == [b"xxxxx"] * 5


@pytest.mark.parametrize(("local", "address"), [("2", "127.0.0.1"), ("1", None), ("", None)])
def test_where_all_ranks_are_on_one_host_nobody_else_can_connect(
    local: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    opened: list[str] = []

    def listen(*, loopback: bool) -> list[socket.socket]:
        listeners = listening(loopback=loopback)
        opened.append(listeners[0].getsockname()[0])
        return listeners

    monkeypatch.setattr(hub_module, "listening", listen)
    hub = rendezvous.open_link(0, 2, "here", 60.0)
    assert isinstance(hub, Hub)
    (found,) = opened
    assert found == (address or found)
    assert (found in ("::", "0.0.0.0")) is (address is None)


def test_another_server_at_a_name_of_rank_0_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")  # it listens on no address of others
    hub = rendezvous.open_link(0, 2, "here", 60.0)
    assert isinstance(hub, Hub)
    # A loopback name is everybody's: on this host it leads to some other program.
    with socket.create_server(("127.0.0.2", hub.port)) as other:
        monkeypatch.setattr(rendezvous, "hosts_of", lambda address: ["127.0.0.2", "127.0.0.1"])
        monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.2)
        monkeypatch.setattr(rendezvous, "GREETING_SECONDS", 0.2)
        assert other.fileno() >= 0  # it accepts in the kernel, and never says a word
        line = rendezvous.open_link(1, 2, "here", 60.0)
    job = [JobCoordinator(hub), JobCoordinator(line)]
    works = [partial(each.round, topic(), b"x", b"".join, deadline=long()) for each in job]
    assert on_every_rank(works) == [b"xx"] * 2


def test_why_rank_0_opens_no_port_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit")
    monkeypatch.setattr(rendezvous, "DOUBT_SECONDS", 0.0)
    for rank in (0, 1):
        with pytest.raises(CoordinationError, match="RLIMIT_NOFILE") as caught:
            rendezvous.open_link(rank, hard + 1, "here", 3600.0)
        assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.PEER_FAILED, [0])
    monkeypatch.setattr(rendezvous, "DOUBT_SECONDS", 60.0)
    # Rank 0 is started anew, with another limit, and replaces what it had said.
    joined(2)


def test_a_dead_rank_0_of_an_earlier_start_is_replaced() -> None:
    dead = rendezvous.open_link(0, 2, "here", 60.0)
    del dead
    joined(2)


@pytest.mark.parametrize(
    ("agents", "restarts", "says"),
    [("True", "3", True), ("True", "0", False), ("False", "3", False), ("", "", False)],
)
def test_rank_0_says_that_restarted_workers_will_get_an_old_store(
    *,
    agents: str,
    restarts: str,
    says: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agents)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts or "0")
    rendezvous.open_link(0, 2, "here", 60.0)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) is says


def test_a_rank_of_another_start_does_not_join_one_that_still_lives(shared: HashStore) -> None:
    """The store outlived a restart, and so did rank 0 of the start before it, on a lost host."""
    old = joined(2)
    works = [partial(each.round, topic(), b"x", b"".join, deadline=long()) for each in old]
    assert on_every_rank(works) == [b"xx"] * 2
    # The new rank 1 is there before the new rank 0, and finds the address of the old one.
    asked = PrefixStore("here", shared)
    before = asked.add("waiting", 0)

    def be_rank_0() -> Hub | Line:
        while asked.add("waiting", 0) == before:
            pass
        return rendezvous.open_link(0, 2, "here", 60.0)

    def be_rank_1() -> Hub | Line:
        return rendezvous.open_link(1, 2, "here", 60.0)

    hub, line = on_every_rank([be_rank_0, be_rank_1])
    assert isinstance(hub, Hub)
    assert not isinstance(line, BaseException)
    new = [JobCoordinator(hub), JobCoordinator(line)]
    works = [partial(each.round, topic(), b"y", b"".join, deadline=long()) for each in new]
    assert on_every_rank(works) == [b"yy"] * 2
