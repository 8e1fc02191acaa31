"""Who has left a job: whoever still waits for such a rank is told at once, not at the deadline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch.distributed.distributed_c10d import Store

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.ranks.waiting import named

_ANY = "left/any"


class Departures:
    """What the ranks of one job say when they go: that they send nothing more.

    A rank that ends by an exception says so too, and the others may be waiting for it then.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank

    def announce(self) -> None:
        """Say that this rank sends nothing more."""
        self._store.set(f"left/{self._rank}", "")
        # Set last: who finds it finds who it was.
        self._store.set(_ANY, "")

    def any(self) -> bool:
        """Tell whether some rank has left: one question, however many ranks there are."""
        return bool(self._store.check([_ANY]))

    def leaves(self, ranks: Collection[int]) -> Callable[[], bool]:
        """Return what tells whether one of `ranks` has left."""
        return lambda: self.any() and bool(self.among(ranks))

    def among(self, ranks: Iterable[int]) -> set[int]:
        """Return those of `ranks` that have left."""
        return {rank for rank in ranks if self._store.check([f"left/{rank}"])}


def absence(
    label: str,
    absent: Collection[int],
    gone: Collection[int],
    span_seconds: float,
    *,
    hint: str = "",
) -> CoordinationError:
    """Return the error of a round to which not all ranks came.

    Args:
        label: how messages call what the round is for.
        absent: the ranks that did not come.
        gone: those of them that never will, since they left.
        span_seconds: how long was waited for them where none has left.
        hint: what to do about it there.
    """
    why = f"within {span_seconds:g} s{hint}"
    if gone:
        why = (
            f"and rank {named(gone)} never will: it closed its Checkpointer or ended by an "
            "error, and every rank must make the same calls in the same order"
        )
    return CoordinationError(
        f"{label}: rank {named(absent)} did not arrive {why}",
        kind=ErrorKind.PEER_ABSENT,
        ranks={rank: "left before" if rank in gone else "did not arrive" for rank in absent},
    )
