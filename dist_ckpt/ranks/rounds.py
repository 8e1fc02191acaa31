"""Rounds: every rank sends one message or its error, rank 0 decides, and every rank is told.

Here is what callers of rounds need, and the whole job that is one process; `coordinator` has the
rounds of several processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import msgspec

from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.ranks.waiting import ALIKE, noted, ranks_as_text

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Topic:
    """Names a round.

    Attributes:
        key: equal on all ranks, used once.
        label: how error messages call what the round is for.
        opens: whether it is the first round of a call: who does not come has not made the call.
        asked: what decides which rounds the call has, by name: told where ranks come to others.
    """

    key: str
    label: str
    opens: bool = False
    asked: Mapping[str, str] = field(default_factory=dict)

    def phase(self, name: str) -> Topic:
        """Return the topic of one round of several that serve the same end."""
        return replace(self, key=f"{self.key}/{name}", opens=False)

    def opening(self, name: str) -> Topic:
        """Return the topic of the first of these rounds."""
        return replace(self, key=f"{self.key}/{name}", opens=True)

    @property
    def hint(self) -> str:
        """What to do when somebody does not come, as the end of a message; may be empty."""
        return f": {ALIKE}" if self.opens else ""


Decide = Callable[[Sequence[bytes]], bytes | Sequence[bytes]]
"""Rank 0's decision over the messages by rank: one answer for all, or one for each rank."""

# Rank 0 gives up a little before the others, so that they hear from it who was absent.
_COORDINATOR_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock, and the span in seconds that led to it."""

    at: float
    span_seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline `seconds` from now."""
        return cls(time.monotonic() + seconds, seconds)

    def for_coordinator(self) -> Deadline:
        """Return the earlier deadline that rank 0 keeps, so that the others hear its verdict."""
        # A share of the whole span, also of what is over, so that all rounds of a call keep one.
        early = self.span_seconds * (1 - _COORDINATOR_SHARE)
        return Deadline(self.at - early, self.span_seconds)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.at

    @property
    def remaining_seconds(self) -> float:
        """How long it still is, at least 0."""
        return max(0.0, self.at - time.monotonic())


class Coordinator(Protocol):
    """One member of a job whose ranks agree in rounds."""

    rank: int
    world_size: int

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        """Send `message` under `topic` and return rank 0's answer for this rank.

        Args:
            topic: names the round; every rank uses it once.
            message: this rank's contribution, or the error that keeps it from having one.
            decide: called on rank 0 only, when all messages are there.
            deadline: when to give up.

        Raises:
            CheckpointError: a rank sent an error or `decide` failed; the same on every rank,
                `ranks` naming the causes.
            CoordinationError: a rank did not arrive, or rank 0 did not answer, before the deadline;
                or another rank failed with a foreign error.
            BaseException: a foreign `message`, as it is, on the rank that sent it, and a foreign
                error of `decide` on rank 0: whoever handles it there knows its class.
        """
        ...

    def verdict(self, topic: Topic) -> CheckpointError | None:
        """Return the error with which the round ended, if it ended with one; never waits.

        It is known to every rank as soon as it is to rank 0, also to one that has not come to the
        round. On rank 0, while it decides, also the error of a rank that refuses the round.
        """
        ...

    def refuse(self, topic: Topic, error: CheckpointError) -> None:
        """End the round on every rank by `error`, unless it is decided; to be called at any time.

        Once all messages are there it is for rank 0 to heed it: see `verdict`.
        """
        ...

    def beside(
        self, topic: Topic, work: Callable[[], ResultT], let_go: Callable[[ResultT], None]
    ) -> ResultT:
        """Do what cannot be interrupted and waits for other ranks, before the message of a round.

        Args:
            topic: names the round.
            work: what to do, on another thread; it ends by itself, sooner or later.
            let_go: called with its result where nobody waits for it any more.

        Returns:
            What `work` returned.

        Raises:
            CheckpointError: the round has failed, or a rank is gone without which it will; `work`
                is left to itself.
            BaseException: what `work` raised.
        """
        ...

    def post(self, name: str, data: bytes) -> None:
        """Put a note up under `name`, in the place of the one that was there.

        That of rank 0 is for all ranks, that of another is for rank 0 alone.

        Raises:
            CoordinationError: the connection to rank 0 was lost.
        """
        ...

    def look(self, name: str) -> bytes | None:
        """Return the note under `name`, None when there is none; never waits.

        Raises:
            CoordinationError: there is none, and the connection to rank 0 was lost.
        """
        ...

    def wait_for(self, look: Callable[[], ResultT], deadline: Deadline) -> ResultT:
        """Call `look` now and whenever something was heard until it returns something true.

        Returns:
            That, or what it returned last when the deadline passed.
        """
        ...

    def leave(self, deadline: Deadline) -> None:
        """Say that this rank sends nothing more; rank 0, which tells the others, leaves last."""
        ...


class SoloCoordinator:
    """The whole job is this process."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._notes: dict[str, bytes] = {}

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        """Decide at once; see `Coordinator.round`."""
        if isinstance(message, BaseException):
            raise noted(topic.label, message)
        try:
            answer = decide([message])
        except Exception as error:
            noted(topic.label, error)
            raise
        return answer if isinstance(answer, bytes) else answer[0]

    def verdict(self, topic: Topic) -> CheckpointError | None:
        """Nobody else could have decided."""
        return None

    def refuse(self, topic: Topic, error: CheckpointError) -> None:
        """Nobody else has to be told."""

    def beside(
        self, topic: Topic, work: Callable[[], ResultT], let_go: Callable[[ResultT], None]
    ) -> ResultT:
        """Nobody else is waited for."""
        return work()

    def post(self, name: str, data: bytes) -> None:
        """Put a note up; see `Coordinator.post`."""
        self._notes[name] = data

    def look(self, name: str) -> bytes | None:
        """Return a note; see `Coordinator.look`."""
        return self._notes.get(name)

    def wait_for(self, look: Callable[[], ResultT], deadline: Deadline) -> ResultT:
        """Nobody else is heard."""
        return look()

    def leave(self, deadline: Deadline) -> None:
        """Nobody else is there."""


@dataclass(frozen=True, slots=True)
class Coordinators:
    """Two coordinators of one job, one for each thread that takes part in rounds."""

    training: Coordinator
    writer: Coordinator


def on_every_rank(
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
    outcome: bytes | BaseException
    try:
        done.append(work())
        outcome = message(done[0])
    except BaseException as error:
        # Its part in the round, so that nobody waits for a rank that failed. An interrupt too: it
        # need not end this rank, and where it does its peers hear why.
        outcome = error
    answer = coordinator.round(topic, outcome, decide, deadline=deadline)
    # There is one: had it failed here, the round would have raised.
    return done[0], answer


# What ranks say to one another: plain data, and the check that all were asked for one thing.


MessageT = TypeVar("MessageT", bound=msgspec.Struct)


class Request(Protocol):
    """The first word of a call that every rank has to make alike."""

    @property
    def step(self) -> int | None:
        """Which checkpoint."""

    @property
    def url(self) -> str:
        """Where."""

    @property
    def options(self) -> Mapping[str, str]:
        """How, each option as text."""


def check_same(requests: Sequence[Request], verb: str) -> None:
    """Check that all ranks were asked for one thing, and in one way.

    Args:
        requests: the first word of each rank.
        verb: what they were asked to do, for the message.

    Raises:
        UsageError: with what each rank was asked for, or two ranks and the option in which they
            differ.
    """
    _check_alike({rank: each.url for rank, each in enumerate(requests)}, "url", verb)
    # Before the step: ranks that save at other steps may do so because of such a difference.
    _check_ways(requests, verb)
    _check_alike({rank: each.step for rank, each in enumerate(requests)}, "step", verb)


def _check_alike(asked: Mapping[int, object], what: str, verb: str) -> None:
    if len(set(asked.values())) > 1:
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in asked.items())
        raise UsageError(
            f"the ranks were asked to {verb} different things ({what}: {listed}): make the call "
            "with the same arguments on every rank",
            ranks={rank: str(value) for rank, value in asked.items()},
        )


def _check_ways(requests: Sequence[Request], verb: str) -> None:
    first = requests[0].options
    for rank, request in enumerate(requests):
        # The usual case costs one comparison; only a difference is looked for by name.
        if request.options == first:
            continue
        for name in sorted({*first, *request.options}):
            here, there = (options.get(name, "absent") for options in (first, request.options))
            if here != there:
                raise UsageError(
                    f"the ranks were asked to {verb} in different ways ({name} is {here} on rank 0 "
                    f"and {there} on rank {rank}): make the call with the same options on every "
                    "rank",
                    ranks={0: f"{name}: {here}", rank: f"{name}: {there}"},
                )


def asked_by(rank: int) -> str:
    """Return the name of the note by which a rank says what `apart` tells of it."""
    return f"asked/{rank}"


def apart(label: str, mine: Mapping[str, str], notes: Mapping[int, bytes | None]) -> UsageError:
    """Return the error of ranks that came to other rounds of a call than rank 0, and wait there.

    Args:
        label: how rank 0 calls what its round is for.
        mine: what decides which rounds there are, on rank 0; see `Topic.asked`.
        notes: the same of those ranks, encoded; None where it is not known.
    """
    kind = dict[str, str]
    others = {r: msgspec.msgpack.decode(n, type=kind) if n else {} for r, n in notes.items()}
    told = []
    for name in sorted({name for said in (mine, *others.values()) for name in said}):
        values: dict[str, list[int]] = {}
        for rank, said in {0: mine, **others}.items():
            values.setdefault(said.get(name, "not said"), []).append(rank)
        if len(values) > 1:
            shown = (f"{value} on rank {ranks_as_text(ranks)}" for value, ranks in values.items())
            told.append(f"{name} is {' and '.join(shown)}")
    why = "; ".join(told) or f"rank {ranks_as_text(others)} waits in another step of it than rank 0"
    return UsageError(
        f"{label}: the ranks make different calls ({why}): make the same call with the same "
        "arguments on every rank",
        ranks=dict.fromkeys(others, why),
    )


def pack(message: msgspec.Struct) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type[MessageT]) -> MessageT:
    """Decode a message of a known kind."""
    return msgspec.msgpack.decode(data, type=kind)
