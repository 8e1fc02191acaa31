"""What is said of ranks that others wait for: a word after a while, and more in the error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable

import msgspec
from torch.distributed.distributed_c10d import Store

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    describe,
    from_wire,
    to_wire,
)

_PATIENCE_SECONDS = 30.0

ALIKE = (
    "every rank must make the same calls in the same order; if one rank saves or loads by itself, "
    "give ranks='alone' there, and if some do, their process_group="
)
"""What to do where a rank does not come to a call."""

_log = logging.getLogger("dist_ckpt")


class Waiting:
    """Says once, when the ranks of a call have been waited for for a while, which are missing.

    Ranks come to a save minutes apart where one of them evaluates meanwhile, so this is no error;
    but a call that only one rank makes looks the same until the deadline, which is far.
    """

    def __init__(
        self,
        label: str,
        seconds: float,
        absent: Callable[[], Collection[int]],
        *,
        over: Callable[[], bool] = lambda: False,
        says: bool = True,
    ) -> None:
        """Begin to wait.

        Args:
            label: what for.
            seconds: after which the waiting ends.
            absent: returns who is missing.
            over: tells whether somebody who is waited for will never come.
            says: whether anything is said; only the first round of a call does.
        """
        # Well before the deadline, where that is near.
        self._seconds = min(_PATIENCE_SECONDS, seconds / 4)
        self._at = time.monotonic() + self._seconds
        self._label = label
        self._absent = absent
        self._over = over
        self._said = not says

    def in_vain(self) -> bool:
        """Say it, if it is time and was not said yet; return whether waiting on is of no use."""
        self._say()
        return self._over()

    def _say(self) -> None:
        if self._said or time.monotonic() < self._at:
            return
        self._said = True
        absent = self._absent()
        if absent:
            _log.warning(
                "%s: waiting for rank %s since %.3g s: %s",
                self._label,
                ranks_as_text(absent),
                self._seconds,
                ALIKE,
            )


def ranks_as_text(ranks: Collection[int]) -> str:
    """Return ranks as text, however many: `0, 3-7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join(
        # Of two in a row both are named: nothing is shorter.
        f"{run[0]}{'-' if run[-1] > run[0] + 1 else ', '}{run[-1]}" if len(run) > 1 else str(run[0])
        for run in runs
    )


# Who has left a job: whoever still waits for such a rank is told at once, not at the deadline.


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
            f"and rank {ranks_as_text(gone)} never will: it closed its Checkpointer or ended by an "
            "error, and every rank must make the same calls in the same order"
        )
    return CoordinationError(
        f"{label}: rank {ranks_as_text(absent)} did not arrive {why}",
        kind=ErrorKind.PEER_ABSENT,
        ranks={rank: "left before" if rank in gone else "did not arrive" for rank in absent},
    )


# The words of a round, and how one rank's failure becomes the error of the whole job.


def envelope(rank: int, message: bytes | BaseException) -> bytes:
    """Return what a rank sends: who it is, and its message or its error."""
    if isinstance(message, BaseException):
        return msgspec.msgpack.encode((rank, b"", to_wire(message)))
    return msgspec.msgpack.encode((rank, message, None))


def opened(data: bytes) -> tuple[int, bytes, dict[str, object] | None]:
    """Return what `envelope` put together: the rank, its message, and its error if it has one."""
    return msgspec.msgpack.decode(data, type=tuple[int, bytes, dict[str, object] | None])


def failure(label: str, rank: int, cause: BaseException) -> CheckpointError:
    """Return the error of the whole job: the class of the cause, and the rank in the message."""
    text = describe(cause)
    if isinstance(cause, CheckpointError) and cause.ranks:
        # It says itself whose fault it was; who passes it on must not be blamed.
        message = text if text.startswith(label) else f"{label} failed: {text}"
        return type(cause)(message, kind=cause.kind, ranks=cause.ranks)
    message = f"{label} failed on rank {rank}: {text}"
    if isinstance(cause, CheckpointError):
        return type(cause)(message, kind=cause.kind, ranks={rank: text})
    return CoordinationError(message, kind=ErrorKind.PEER_FAILED, ranks={rank: text})


def noted(label: str, error: BaseException) -> BaseException:
    """Return `error` with a note of what it ended; an error of ours says so itself."""
    note = f"{label} failed"
    if not isinstance(error, CheckpointError) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error


def decode_error(data: bytes) -> CheckpointError:
    """Return the error that rank 0 sent."""
    return from_wire(msgspec.msgpack.decode(data, type=dict[str, object]))
