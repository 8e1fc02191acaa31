"""Ranks as threads: coordinators over real connections within this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from dist_ckpt.ranks.coordinator import JobCoordinator, Line
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rendezvous import Address, connect
from dist_ckpt.ranks.rounds import Deadline, Topic

T = TypeVar("T")

# Nobody waits this long: where it matters, a test that did would end by its own time limit.
LONG_SECONDS = 3600.0


def topic(key: str = "round") -> Topic:
    """Return a topic whose label tells its key."""
    return Topic(key, f"the {key}")


def long() -> Deadline:
    """Return a deadline that no test reaches."""
    return Deadline.after(LONG_SECONDS)


def on_every_rank(works: Sequence[Callable[[], T]]) -> list[T | BaseException]:
    """Call each of `works` on a thread of its own; return results, or what was raised."""
    results: dict[int, T | BaseException] = {}

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(works))]


def hub_of(world_size: int) -> Hub:
    """Return what rank 0 of a job has."""
    return Hub(world_size, loopback=True)


def line_to(hub: Hub, rank: int) -> Line:
    """Return what another rank has."""
    address = Address(hostname="127.0.0.1", port=hub.port, secret=hub.secret.hex())
    return connect(address, rank, hub.world_size, until=long().at)


def links(world_size: int) -> list[Hub | Line]:
    """Return what connects the ranks of one job, by rank."""
    hub = hub_of(world_size)
    return [hub, *(line_to(hub, rank) for rank in range(1, world_size))]


def members(world_size: int) -> list[JobCoordinator]:
    """Return the coordinators of one job."""
    return [JobCoordinator(link) for link in links(world_size)]
