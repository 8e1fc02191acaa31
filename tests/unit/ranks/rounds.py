"""Ranks as threads: coordinators over one c10d store in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in its stubs
from torch.distributed.distributed_c10d import Store

from dist_ckpt.ranks.coordinator import StoreCoordinator
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


def hash_store() -> Store:
    """Return a store that lives in this process."""
    store: Store = HashStore()
    return store


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


def members(world_size: int, store: Store | None = None) -> list[StoreCoordinator]:
    """Return the coordinators of one job."""
    shared = store or hash_store()
    return [StoreCoordinator(shared, rank, world_size) for rank in range(world_size)]
