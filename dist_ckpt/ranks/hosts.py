"""Which ranks of a job are on one host, and so have one folder where hosts share no disk."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of a job, numbered in the order of their lowest ranks.

    The lowest rank of a host leads it: what is done once for each folder is done there.

    Attributes:
        names: what messages call each host.
        of_rank: for each rank, the number of its host.
    """

    names: tuple[str, ...]
    of_rank: tuple[int, ...]

    @property
    def leaders(self) -> tuple[int, ...]:
        """For each host the rank that leads it."""
        return tuple(self.of_rank.index(host) for host in range(len(self.names)))

    def leads(self, rank: int) -> bool:
        """Tell whether `rank` leads its host."""
        return self.leaders[self.of_rank[rank]] == rank

    def ranks(self, host: int) -> list[int]:
        """Return the ranks of a host, ascending."""
        return [rank for rank, other in enumerate(self.of_rank) if other == host]


@decodable
class _Here(msgspec.Struct, frozen=True):
    """Where a rank is: two are on one host where all of it is equal."""

    name: str
    boot: str
    url: str


def find_hosts(coordinator: Coordinator, url: str, *, topic: Topic, deadline: Deadline) -> Hosts:
    """Find out together which ranks are on one host; a round.

    Nothing in the environment is asked, as each launcher counts in a way of its own there. Two
    containers of one machine are two hosts where they have names, or folders, of their own.

    Args:
        coordinator: the way to the other ranks.
        url: the folder of this rank.
        topic: names the round.
        deadline: when to give up.

    Raises:
        CoordinationError: a rank did not come.
    """
    # Tells apart machines of one name; where it cannot be had, name and folder have to do.
    boot = ""
    with suppress(OSError):
        boot = _BOOT_ID.read_text().strip()

    def decide(messages: Sequence[bytes]) -> bytes:
        # In the order of ranks, by which hosts are numbered.
        distinct = list(dict.fromkeys(messages))
        said = [msgspec.msgpack.decode(each, type=_Here) for each in distinct]
        of_rank = [distinct.index(each) for each in messages]
        return msgspec.msgpack.encode((_told_apart(said), of_rank))

    here = msgspec.msgpack.encode(_Here(socket.gethostname(), boot, url))
    answer = coordinator.round(topic, here, decide, deadline=deadline)
    names, of_rank = msgspec.msgpack.decode(answer, type=tuple[list[str], list[int]])
    return Hosts(tuple(names), tuple(of_rank))


def _told_apart(said: Sequence[_Here]) -> list[str]:
    names = [each.name for each in said]
    return [
        each.name if names.count(each.name) == 1 else f"{each.name} ({each.url})" for each in said
    ]
