"""One piece of work on every rank, and one outcome for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dist_ckpt.ranks.coordinator import Coordinator, Deadline, Decide, Topic

ResultT = TypeVar("ResultT")


def together(
    coordinator: Coordinator,
    topic: Topic,
    work: Callable[[], ResultT],
    *,
    deadline: Deadline,
    message: Callable[[ResultT], bytes] = lambda _: b"",
    decide: Decide = lambda _: b"",
) -> tuple[ResultT, bytes]:
    """Do `work` on this rank; return its result and rank 0's answer when it succeeded on every one.

    Args:
        coordinator: the way to the other ranks.
        topic: names the round.
        work: what to do.
        deadline: when to give up.
        message: what the others are told of the result.
        decide: rank 0's decision over these messages.

    Raises:
        CheckpointError: it failed on some rank, or `decide` refused; the same on every rank.
    """
    done: list[ResultT] = []
    outcome: bytes | Exception
    try:
        done.append(work())
        outcome = message(done[0])
    except Exception as error:
        outcome = error
    answer = coordinator.round(topic, outcome, decide, deadline=deadline)
    return done[0], answer
