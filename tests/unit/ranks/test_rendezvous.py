"""How ranks find rank 0: by what it publishes, or by why it could not."""

from __future__ import annotations

import resource
import socket
from functools import partial

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in its stubs

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks import rendezvous
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.hub import Hub
from tests.unit.ranks.rounds import long, on_every_rank, topic


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the ranks of this process a store of a training."""
    store = HashStore()
    monkeypatch.setattr(rendezvous, "_get_default_store", lambda: store)
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def joined(world_size: int) -> list[JobCoordinator]:
    found = on_every_rank(
        [partial(rendezvous._open, rank, world_size, "here", 60.0) for rank in range(world_size)]
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
    hub = rendezvous._open(0, 2, "here", 60.0)
    assert isinstance(hub, Hub)
    port = hub.board._tell.__self__  # type: ignore[attr-defined]
    found = port._listener.getsockname()[0]
    assert found == (address or found)
    assert (found in ("::", "0.0.0.0")) is (address is None)


def test_another_server_at_a_name_of_rank_0_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")  # it listens on no address of others
    hub = rendezvous._open(0, 2, "here", 60.0)
    assert isinstance(hub, Hub)
    # A loopback name is everybody's: on this host it leads to some other program.
    with socket.create_server(("127.0.0.2", hub.port)) as other:
        monkeypatch.setattr(
            rendezvous, "_candidates", lambda address: iter(["127.0.0.2", "127.0.0.1"])
        )
        monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 0.2)
        monkeypatch.setattr(rendezvous, "_GREETING_SECONDS", 0.2)
        assert other.fileno() >= 0  # it accepts in the kernel, and never says a word
        line = rendezvous._open(1, 2, "here", 60.0)
    job = [JobCoordinator(hub), JobCoordinator(line)]
    works = [partial(each.round, topic(), b"x", b"".join, deadline=long()) for each in job]
    assert on_every_rank(works) == [b"xx"] * 2


def test_why_rank_0_opens_no_port_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit")
    monkeypatch.setattr(rendezvous, "_DOUBT_SECONDS", 0.0)
    for rank in (0, 1):
        with pytest.raises(CoordinationError, match="RLIMIT_NOFILE") as caught:
            rendezvous._open(rank, hard + 1, "here", 3600.0)
        assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.PEER_FAILED, [0])
    monkeypatch.setattr(rendezvous, "_DOUBT_SECONDS", 60.0)
    # Rank 0 is started anew, with another limit, and replaces what it had said.
    joined(2)


def test_a_dead_rank_0_of_an_earlier_start_is_replaced() -> None:
    dead = rendezvous._open(0, 2, "here", 60.0)
    del dead
    joined(2)
