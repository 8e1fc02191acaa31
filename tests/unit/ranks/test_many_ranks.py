"""Hundreds of real coordinators, some silent, some dead, some in error: each is named in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from benchmarks.scale.rounds import Count
from dist_ckpt.errors import CoordinationError, ErrorKind, StorageError
from dist_ckpt.ranks.channels import running_loop
from dist_ckpt.ranks.coordinator import JobCoordinator, Line
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rounds import Deadline
from tests.unit.ranks.rounds import LONG_SECONDS, links, long, on_every_rank, topic

WORLD = 512
SILENT = {7, 130, 131, 132, 511}
DEAD = {5, 64, 300, 301}
FAILING = {1, 200, 510}


class Crowd:
    """The ranks of a large job, of which some may be ended."""

    def __init__(self) -> None:
        self.links = dict(enumerate(links(WORLD)))
        self.hub = cast(Hub, self.links[0])

    def round(
        self,
        key: str,
        *,
        without: set[int] = frozenset(),  # type: ignore[assignment]
        failing: set[int] = frozenset(),  # type: ignore[assignment]
        seconds: float = LONG_SECONDS,
    ) -> dict[int, bytes | BaseException]:
        def work(rank: int) -> Callable[[], bytes]:
            error = StorageError(f"disk full on {rank}", kind=ErrorKind.STORAGE_FULL)
            message = error if rank in failing else rank.to_bytes(2, "big")
            member = JobCoordinator(self.links[rank])

            def run() -> bytes:
                if rank == 0 and seconds < LONG_SECONDS:
                    # The deadline of those that never come begins when all others have come.
                    board = self.hub.board
                    member.wait_for(lambda: board.count(0, key) == len(ranks) - 1, long())
                span = seconds if rank == 0 else LONG_SECONDS
                return member.round(topic(key), message, total, deadline=Deadline.after(span))

            return run

        ranks = [rank for rank in self.links if rank not in without]
        found = on_every_rank([work(rank) for rank in ranks])
        return dict(zip(ranks, found, strict=True))


def end(link: Hub | Line) -> None:
    """Close the connection of a rank, as the end of its process does."""
    assert isinstance(link, Line)
    (channel,) = link.channel
    running_loop().call(channel.close)


def total(messages: Sequence[bytes]) -> bytes:
    return str(sum(int.from_bytes(each, "big") for each in messages)).encode()


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    found = Crowd()
    yield found
    found.links.clear()


def causes(found: dict[int, bytes | BaseException]) -> dict[int, str]:
    """Return the ranks that all name alike, and why."""
    errors = list(found.values())
    assert all(isinstance(each, CoordinationError | StorageError) for each in errors), errors
    named = [each.ranks for each in errors if isinstance(each, CoordinationError | StorageError)]
    assert all(each == named[0] for each in named)
    return named[0]


def test_silent_dead_and_failing_ranks_are_named(crowd: Crowd) -> None:
    answer = str(sum(range(WORLD))).encode()
    count = Count()
    with count.counting():
        assert set(crowd.round("all well").values()) == {answer}
    # One from each, one to each, and two to the one that was there before rank 0, if one was. Both
    # ends are here: what a rank says is counted where it is sent and where it is heard.
    assert count.frames - 3 * (WORLD - 1) in (0, 2)

    silent = crowd.round("silent", without=SILENT, seconds=1.0)
    assert causes(silent) == dict.fromkeys(SILENT, "did not arrive")

    # Nobody waits for the others of those that do not come, nor for the deadline.
    failed = crowd.round("failing", without=SILENT, failing=FAILING)
    ((rank, cause),) = causes(failed).items()
    assert rank in FAILING
    assert cause == f"disk full on {rank}"
    assert set(crowd.round("well again").values()) == {answer}

    for rank in DEAD:
        end(crowd.links.pop(rank))
    dead = crowd.round("dead", without=SILENT)
    assert causes(dead) == dict.fromkeys(DEAD, "connection lost")
