"""Agreement between ranks: rounds over a c10d store of our own.

In a round every rank sends one message (or its error), rank 0 decides once, and every rank
receives the decision. There are no collectives and the process group of the training is never
used, so rounds run beside it on any thread. Every wait has a deadline, and a rank that did not
arrive is named.

The idea of a two-phase barrier on a store that carries errors is torchsnapshot's
(`dist_store.LinearBarrier`); here ranks draw arrival numbers, so that rank 0 looks at one key at a
time however many ranks there are, and the first error ends the round at once.
"""

from __future__ import annotations

import time

import msgspec
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    describe,
    from_wire,
    to_wire,
)
from dist_ckpt.ranks.rounds import Deadline, Decide, Topic
from dist_ckpt.ranks.waiting import (
    Departures,
    Waiting,
    absence,
    decode_error,
    envelope,
    failure,
    noted,
    opened,
)

LOST = {0: "connection lost"}
"""The cause by rank where rank 0 could not be asked: unlike its verdict, it says nothing of it."""

# The store refuses a value above 8 MiB (c10d's TCPStore, libuv backend).
_PIECE_BYTES = 4 << 20
# A nap is an eighth of the wait so far: that much later, at most, is news heard, and ranks that
# come at different times find one another soon without asking the store all the time.
_FIRST_NAP_SECONDS, _NAP_GROWTH, _LONGEST_NAP_SECONDS = 0.0002, 1.125, 0.02


class StoreCoordinator:
    """One of several ranks. Two of them, on two threads, may share a client of the c10d store."""

    def __init__(
        self, store: Store, rank: int, world_size: int, *, absent: set[int] | None = None
    ) -> None:
        """Join a job.

        Args:
            store: what its ranks share.
            rank: this one.
            world_size: how many there are.
            absent: where rank 0 notes who did not arrive; one for all coordinators of a process.
        """
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._departures = Departures(store, rank)
        self._absent = set() if absent is None else absent
        self._finished: list[str] = []

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        """Take part in one round; see `Coordinator.round`."""
        try:
            number = self._store.add(f"{topic.key}/arrived", 1)
            self._put(f"{topic.key}/message/{number}", envelope(self.rank, message))
            if self.rank == 0:
                self._decide(topic, decide, deadline.for_coordinator())
            answer = self._await_answer(topic, deadline, first=number == 1)
        except DistError as error:
            raise self._lost(topic, error) from error
        except CheckpointError as error:
            if isinstance(message, CheckpointError):
                raise error from message  # what crossed the store has lost its traceback
            if isinstance(message, BaseException):
                raise noted(topic.label, message) from None
            raise
        if answer is None:
            raise CoordinationError(
                f"{topic.label}: rank 0 did not answer within {deadline.span_seconds:g} s"
                f"{topic.hint}",
                kind=ErrorKind.TIMEOUT,
                ranks={0: "no answer"},
            )
        return answer

    def verdict(self, topic: Topic) -> CheckpointError | None:
        """Return the error with which the round ended; see `Coordinator.verdict`."""
        try:
            data = self._try_get(f"{topic.key}/error")
        except DistError as error:
            return self._lost(topic, error)
        return None if data is None else decode_error(data)

    def post(self, name: str, data: bytes) -> None:
        """Put a note up; see `Coordinator.post`."""
        try:
            # A note is far shorter than a piece: it is read whole, the old one or the new one.
            self._put(f"note/{name}", data)
        except DistError as error:
            raise self._lost(Topic(name, f"the note {name!r}"), error) from error

    def look(self, name: str) -> bytes | None:
        """Return a note; see `Coordinator.look`."""
        try:
            return self._try_get(f"note/{name}")
        except DistError as error:
            raise self._lost(Topic(name, f"the note {name!r}"), error) from error

    def leave(self, deadline: Deadline) -> None:
        """Leave; rank 0 waits for the others until the deadline, then goes without them."""
        try:
            self._departures.announce()
            waiting = set(range(self.world_size)) if self.rank == 0 else set()
            while waiting:
                # Not for those that were named absent: most likely they are dead, and whoever is
                # merely late has been told by an error already.
                waiting -= self._absent | self._departures.among(waiting)
                if not waiting or deadline.passed:
                    return
                time.sleep(_LONGEST_NAP_SECONDS)
        except DistError:
            return  # rank 0 has gone before: there is nobody left to tell

    def _decide(self, topic: Topic, decide: Decide, deadline: Deadline) -> None:
        """Rank 0: gather, decide, answer. Whatever goes wrong becomes everybody's error."""
        try:
            if topic.opens:
                self._put(f"{topic.key}/here", b"")
            answer = decide(self._gather(topic, deadline))
        except BaseException as error:
            known = error if isinstance(error, CheckpointError) else failure(topic.label, 0, error)
            self._put(f"{topic.key}/error", msgspec.msgpack.encode(to_wire(known)))
            self._forget_messages(topic.key)
            noted(topic.label, error)
            raise  # as it is, also an interrupt: it stops this rank, and the others have been told
        if isinstance(answer, bytes):
            # One copy for all: an index times a thousand ranks would not fit into memory.
            self._put(f"{topic.key}/answer/all", answer)
        else:
            for rank, data in enumerate(answer):
                self._put(f"{topic.key}/answer/{rank}", data)
        # Set last: who finds it finds the answer.
        self._put(f"{topic.key}/decided", b"all" if isinstance(answer, bytes) else b"each")
        self._forget_messages(topic.key)
        self._forget_answers(topic.key)

    def _await_answer(self, topic: Topic, deadline: Deadline, *, first: bool) -> bytes | None:
        left = self._departures.leaves({0})
        waiting = Waiting(
            topic.label,
            deadline.remaining_seconds,
            # One word for all that wait for rank 0, which names the others itself if it is here.
            lambda: () if self._store.check([f"{topic.key}/here"]) else (0,),
            over=left,
            says=topic.opens and first and self.rank != 0,
        )
        decided = self._wait(f"{topic.key}/decided", f"{topic.key}/error", deadline, waiting)
        if decided is None:
            if left():
                raise absence(topic.label, {0}, {0}, deadline.span_seconds)
            return None
        whose = "all" if decided == b"all" else str(self.rank)
        return self._try_get(f"{topic.key}/answer/{whose}")

    def _gather(self, topic: Topic, deadline: Deadline) -> list[bytes]:
        messages: dict[int, bytes] = {}

        def absent_ranks() -> list[int]:
            return sorted(set(range(self.world_size)) - messages.keys())

        waiting = Waiting(
            topic.label,
            deadline.remaining_seconds,
            absent_ranks,
            over=lambda: bool(self._gone(topic)),
            says=topic.opens,
        )
        for number in range(1, self.world_size + 1):
            data = self._wait(f"{topic.key}/message/{number}", None, deadline, waiting)
            if data is None:
                # A rank that died after it drew its number leaves a gap: those who came after it
                # are looked for once more, so that only the absent are named.
                continue
            rank, body, error = opened(data)
            self._absent.discard(rank)
            if error is not None:
                # The first error ends the round: waiting for more would only delay everybody.
                raise failure(topic.label, rank, from_wire(error))
            messages[rank] = body
        absent = absent_ranks()
        if absent:
            self._absent.update(absent)
            raise absence(
                topic.label, absent, self._gone(topic), deadline.span_seconds, hint=topic.hint
            )
        return [messages[rank] for rank in range(self.world_size)]

    def _gone(self, topic: Topic) -> set[int]:
        """Return the ranks that left without having sent anything to the round."""
        if not self._departures.any():
            return set()
        gone = self._departures.among(range(self.world_size))
        for number in range(1, self.world_size + 1):
            data = self._try_get(f"{topic.key}/message/{number}")
            gone -= set() if data is None else {opened(data)[0]}
        return gone

    def _wait(
        self, key: str, error_key: str | None, deadline: Deadline, waiting: Waiting
    ) -> bytes | None:
        """Return the value of `key`; None if the deadline passed, or waiting is in vain, without.

        Polled, not blocked on: a blocked client cannot be asked anything else, and c10d writes
        warnings to stderr for each wait that times out.
        """
        nap, vain = _FIRST_NAP_SECONDS, False
        while True:
            data = self._try_get(key)
            if data is not None:
                return data
            if error_key is not None:
                failed = self._try_get(error_key)
                if failed is not None:
                    raise decode_error(failed)
            if vain or deadline.passed:
                return None
            time.sleep(nap)
            nap = min(nap * _NAP_GROWTH, _LONGEST_NAP_SECONDS)
            # Asked before the look that follows: what a rank sent before it left counts.
            vain = waiting.in_vain()

    def _put(self, key: str, data: bytes) -> None:
        pieces = range(0, len(data), _PIECE_BYTES)
        for number, start in enumerate(pieces):
            piece = data[start : start + _PIECE_BYTES]
            self._store.set(f"{key}/{number}", piece)  # type: ignore[arg-type]  # bytes are taken
        # The count goes last: who finds it finds every piece.
        self._store.set(key, str(len(pieces)))

    def _try_get(self, key: str) -> bytes | None:
        if not self._store.check([key]):
            return None
        count = int(self._store.get(key))
        return b"".join(bytes(self._store.get(f"{key}/{number}")) for number in range(count))

    def _forget_messages(self, key: str) -> None:
        """Delete what was sent to a round that is decided: nobody but rank 0 reads it."""
        for number in range(1, self.world_size + 1):
            self._delete(f"{key}/message/{number}")

    def _forget_answers(self, key: str) -> None:
        """Delete the answers of the rounds before this one, the last excepted.

        Who sent a message to this round has read its answer of the round before, in this thread's
        sequence. Errors stay: a rank that comes late to a failed round is told at once.
        """
        self._finished.append(key)
        while len(self._finished) > 2:
            old = self._finished.pop(0)
            for whose in ("all", *range(self.world_size)):
                self._delete(f"{old}/answer/{whose}")
            self._delete(f"{old}/decided")
            self._delete(f"{old}/here")
            self._store.delete_key(f"{old}/arrived")

    def _delete(self, key: str) -> None:
        if self._store.check([key]):
            for number in range(int(self._store.get(key))):
                self._store.delete_key(f"{key}/{number}")
            self._store.delete_key(key)

    def _lost(self, topic: Topic, error: BaseException) -> CoordinationError:
        return CoordinationError(
            f"{topic.label}: the connection to rank 0 was lost, it probably died "
            f"({describe(error)})",
            kind=ErrorKind.PEER_ABSENT,
            ranks=LOST,
        )
