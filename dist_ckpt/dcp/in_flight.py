"""One save among several in flight: what belongs to it, and what its ranks send one another.

All calls of one save come on one thread, and a thread has one save at a time: there its state is
kept. What the other ranks send for it bears its token, so that none takes what is another's.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dist_ckpt.dcp.commit import StockAttempt, StockReport
from dist_ckpt.dcp.turns import ThreadEnd, tell_when_gone
from dist_ckpt.errors import UsageError
from dist_ckpt.waiting import Latch


@dataclass(frozen=True, slots=True)
class Wish:
    """What a rank was asked to save, on its way to rank 0; `token` is that of the rank's save."""

    step: int
    url: str
    token: str


@dataclass(frozen=True, slots=True)
class Assigned:
    """Which attempt a rank writes for, and as whom, on its way back."""

    step: int
    save_id: str
    rank: int
    token: str


class Save:
    """One save on one rank.

    Args:
        step: what it was asked to save.

    Attributes:
        token: by which it knows again what is for it.
        attempt: on rank 0, from its plans on.
        over: opened when it is.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.token = secrets.token_hex(8)
        self.attempt: StockAttempt | None = None
        self.over = Latch()
        tell_when_gone(self, self.over)


class Results(list[WriteResult]):
    """What `write_data` returns. It keeps the save, as stock keeps it until the save is over."""

    def __init__(self, report: StockReport, save: Save) -> None:
        super().__init__([WriteResult(MetadataIndex(""), report.nbytes, report)])
        self.save = save

    def __reduce__(self) -> tuple[type[list[WriteResult]], tuple[list[WriteResult]]]:
        return list, (list(self),)


class OfThread(threading.local):
    """What a thread knows of its save.

    Attributes:
        step: the one that was named last in this thread.
        refusal: why what was named is no step.
        save: the save, until it writes.
        writing: the save, from then on.
        end: tells that it is over with this thread.
    """

    step: int | None = None
    refusal: UsageError | None = None
    save: Save | None = None
    writing: weakref.ref[Save] | None = None
    end: ThreadEnd | None = None


def check_wishes(asked: Sequence[Wish]) -> None:
    """Raise unless all ranks were asked for the same.

    Raises:
        UsageError: the first rank that was asked for something else than rank 0.
    """
    for rank, each in enumerate(asked):
        if (each.step, each.url) != (asked[0].step, asked[0].url):
            raise UsageError(
                f"rank 0 was asked to save step {asked[0].step} to {asked[0].url} and rank {rank} "
                f"step {each.step} to {each.url}: give every rank's Writer the same arguments"
            )


def mixed_up() -> UsageError:
    """Return the error of a save that was sent what is another one's."""
    return UsageError(
        "this save was sent what is another one's: several were under way over one process group. "
        "Leave the staging to the Writer (no async_stager), which has them take turns; or give "
        "each its process_group, or wait for the one before"
    )
