"""What is said of ranks that others wait for: a word after a while, and more in the error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import msgspec

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    describe,
    from_wire,
    to_wire,
)
from dist_ckpt.threads import Bell

_T = TypeVar("_T")

_PATIENCE_SECONDS = 30.0

ALIKE = (
    "every rank must make the same calls in the same order; if one rank saves or loads by itself, "
    "give ranks='alone' there, and if some do, their process_group="
)
"""What to do where a rank does not come to a call."""

_LEFT = (
    "it closed its Checkpointer or ended by an error, and every rank must make the same calls in "
    "the same order"
)
_LOST = "its connection was lost, it probably died"

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
        says: bool = True,
    ) -> None:
        """Begin to wait.

        Args:
            label: what for.
            seconds: after which the waiting ends.
            absent: returns who is missing.
            says: whether anything is said; only the first round of a call does.
        """
        self._until = time.monotonic() + seconds
        # Well before the deadline, where that is near.
        self._seconds = min(_PATIENCE_SECONDS, seconds / 4)
        self._at = time.monotonic() + self._seconds
        self._label = label
        self._absent = absent
        self._said = not says

    def wait_for(self, bell: Bell, look: Callable[[], _T]) -> _T:
        """Call `look` now and after each ring until it returns something true, and return that."""
        found = bell.wait_for(look, max(0.0, self._at - time.monotonic()))
        if found:
            return found
        self.say()
        return bell.wait_for(look, max(0.0, self._until - time.monotonic()))

    def say(self) -> None:
        """Say it, if it is time and was not said yet."""
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


def absence(
    label: str,
    *,
    silent: Collection[int] = (),
    left: Collection[int] = (),
    lost: Collection[int] = (),
    span_seconds: float = 0.0,
    hint: str = "",
) -> CoordinationError:
    """Return the error of a round to which not all ranks came.

    Args:
        label: how messages call what the round is for.
        silent: the ranks that did not come and still may.
        left: those that never will, since they left.
        lost: those that never will, since their connection broke.
        span_seconds: how long was waited for the silent ones.
        hint: what to do about these.
    """
    causes = {
        **dict.fromkeys(silent, "did not arrive"),
        **dict.fromkeys(left, "left before"),
        **dict.fromkeys(lost, "connection lost"),
    }
    text = f"{label}: rank {ranks_as_text(causes)} did not arrive"
    if silent:
        text += f" within {span_seconds:g} s{hint}"
    for ranks, why in ((left, _LEFT), (lost, _LOST)):
        if ranks:
            # Named again only where others are missing for another reason.
            who = f", and rank {ranks_as_text(ranks)}" if len(ranks) < len(causes) else " and"
            text += f"{who} never will: {why}"
    return CoordinationError(
        text,
        kind=ErrorKind.PEER_ABSENT,
        ranks=causes,
    )


# The words of a round, and how one rank's failure becomes the error of the whole job.


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
    # Once, though it may pass through here again on its way to the caller.
    if not isinstance(error, CheckpointError) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error


def encode_error(error: CheckpointError) -> bytes:
    """Return an error as `decode_error` takes it."""
    return msgspec.msgpack.encode(to_wire(error))


def decode_error(data: bytes) -> CheckpointError:
    """Return the error that rank 0 sent."""
    return from_wire(msgspec.msgpack.decode(data, type=dict[str, object]))
