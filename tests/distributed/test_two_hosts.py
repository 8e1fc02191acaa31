"""Ranks on two hosts find each other by whatever works, and notice when one has gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rendezvous import Address, connect, training_store
from dist_ckpt.ranks.rounds import Deadline, Topic
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.services.hosts import Hosts

LONG_SECONDS = 3600.0  # nobody waits this long
LISTENS = "0A"


def enter(hosts: Hosts) -> None:
    """Be on the host of this rank, as torchrun would have started it there."""
    host = hosts[dist.get_rank()]
    host.enter()
    os.environ.update(LOCAL_WORLD_SIZE="1", GLOO_SOCKET_IFNAME=host.interface)


def listeners() -> set[str]:
    """Return the addresses at which programs of this host listen, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENS:
                found.add(local.split(":")[0].strip("0"))
    return found


def save_with_names(hosts: Hosts, root: str, names: dict[str, str]) -> dict[str, bool]:
    """Save once with each MASTER_ADDR; return whether rank 0 listened on every address then."""
    enter(hosts)
    groups = {name: dist.new_group([0, 1]) for name in names}
    everywhere = {}
    for name, master in names.items():
        if name != "interface given":
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
        if name == "IPv6 alone" and dist.get_rank() == 0:
            hosts.forget_ipv4()
        os.environ["MASTER_ADDR"] = master
        place, state = f"{root}/{name}", {"w": torch.ones(100)}
        dist_ckpt.save({"part": state}, place, step=1, process_group=groups[name])
        everywhere[name] = "" in listeners()
    return everywhere


def test_rank_0_is_found_by_whatever_works(cables: Hosts, tmp_path: Path) -> None:
    names = {
        "interface given": cables[0].address,
        "an address of another network": cables.behind_a_router(),
        "an address of nobody": cables.outside[:-1] + "99",
        "a name that nobody can resolve": "node-0.cluster.invalid",
    }
    last = {"IPv6 alone": cables[0].address_6}
    found = run_ranks(2, save_with_names, cables, str(tmp_path), names)
    # By processes of their own: those above may not have said good-bye yet, over IPv4.
    on_6 = run_ranks(2, save_with_names, cables, str(tmp_path), last)
    assert (found[1], on_6[1]) == (dict.fromkeys(names, False), dict.fromkeys(last, False))
    # Where the training was told its interface, no other is listened to.
    assert found[0] == {name: name != "interface given" for name in names}
    assert on_6[0] == dict.fromkeys(last, True)
    for name in (*names, *last):
        assert Repository(LocalStore(tmp_path / name)).verify(1).ok


def save_on_loopbacks(hosts: Hosts, root: str) -> None:
    enter(hosts)
    os.environ["MASTER_ADDR"] = hosts[0].address
    dist_ckpt.save({"part": {"w": torch.ones(100)}}, root, step=1)


def test_hosts_that_are_loopback_addresses(tmp_path: Path) -> None:
    """What is left of the test above where namespaces are not allowed."""
    run_ranks(2, save_on_loopbacks, Hosts("", real=False), str(tmp_path))
    assert Repository(LocalStore(tmp_path)).verify(1).ok


def lose_the_other(hosts: Hosts, cut: int) -> tuple[ErrorKind, str]:
    """Wait in a round for a host that has gone without a word."""
    enter(hosts)
    store, silence = training_store(), 1.0
    if dist.get_rank() == 0:
        hub = Hub(2, silence_seconds=silence)
        store.set("here", f"{hub.port} {hub.secret.hex()}")
        member = JobCoordinator(hub)
    else:
        port, secret = store.get("here").decode().split()
        address = Address(hosts=(hosts[0].address,), port=int(port), secret=secret)
        until = Deadline.after(LONG_SECONDS).at
        member = JobCoordinator(connect(address, 1, 2, until=until, silence_seconds=silence))

    def round_of(name: str) -> bytes:
        deadline = Deadline.after(LONG_SECONDS)
        return member.round(Topic(name, name), b"x", b"".join, deadline=deadline)

    assert round_of("first") == b"xx"
    if dist.get_rank() != cut:
        store.wait(["heard"])  # else the answer may still be on the way
        hosts.cut(cut)
        with pytest.raises(CoordinationError) as caught:
            round_of("second")
        store.set("told", "")
        return caught.value.kind, str(caught.value)
    store.set("heard", "")
    store.wait(["told"])  # alive all the while, and cut off
    return ErrorKind.PEER_ABSENT, ""


@pytest.mark.parametrize("cut", [0, 1])
def test_a_host_that_has_gone_without_a_word_is_noticed(cut: int, cables: Hosts) -> None:
    found = run_ranks(2, lose_the_other, cables, cut)
    kind, message = found[1 - cut]
    assert kind is ErrorKind.PEER_ABSENT
    assert (
        "connection to rank 0 was lost" if cut == 0 else "rank 1 did not arrive and never will"
    ) in message
