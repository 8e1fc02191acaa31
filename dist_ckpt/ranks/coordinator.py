"""Agreement between the processes of a job: rounds over one connection of each rank to rank 0.

In a round every rank sends one message (or its error), rank 0 decides once, and every rank
receives the decision. There are no collectives and the process group of the training is never
used, so rounds run beside it on any thread. Every wait has a deadline, and a rank that did not
arrive is named. Whoever waits sleeps until it is told: nobody asks rank 0 for anything.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, from_wire, to_wire
from dist_ckpt.ranks.channels import (
    MESSAGE_LIMIT_BYTES,
    Channel,
    Frame,
    FrameKind,
    packed,
    running_loop,
    unpacked,
)
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rounds import Deadline, Decide, Topic, apart, asked_by
from dist_ckpt.ranks.seals import Packed, Seals
from dist_ckpt.ranks.waiting import Waiting, absence, decode_error, encode_error, failure, noted
from dist_ckpt.threads import Bell, Latch, Making

LOST = {0: "connection lost"}
"""The cause by rank where rank 0 could not be asked: unlike its verdict, it says nothing of it."""

# One that dies seldom dies alone: so long is waited for the others of its host, to name them too.
_GRACE_SECONDS = 0.5

_T = TypeVar("_T")


class Line:
    """What every other rank has: one connection to rank 0, for all its jobs and threads.

    Attributes:
        rank: this one.
        world_size: how many there are.
        bell: rung when something was heard.
        heard: what rank 0 has said.
        channel: the connection, once the thread of the loop has put it there; for that thread.
    """

    def __init__(self, connection: socket.socket, seals: Seals, rank: int, world_size: int) -> None:
        """Begin to listen.

        Args:
            connection: to rank 0, which has let this rank in.
            seals: of what is said on it.
            rank: this one.
            world_size: how many there are.
        """
        self.rank = rank
        self.world_size = world_size
        self.bell = Bell()
        self.heard = Heard(self.bell)
        self._loop = running_loop()
        self.channel: list[Channel] = []
        # Neither knows this object: the connection ends with the last that uses it.
        self._loop.call(partial(_listen, connection, seals, self.heard, self.channel))
        weakref.finalize(self, self._loop.call, partial(_hang_up, self.channel)).atexit = False

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        data, channel = packed(frame), self.channel
        self._loop.call(lambda: channel[0].send(data))

    def wait_until_sent(self, seconds: float) -> None:
        """Wait until what was sent has left, for at most so long."""
        sent, channel = Latch(), self.channel
        self._loop.call(lambda: channel[0].when_sent(sent.open))
        sent.wait(seconds)


def _listen(connection: socket.socket, seals: Seals, heard: Heard, channel: list[Channel]) -> None:
    channel.append(
        Channel(running_loop(), connection, on_body=heard.take, on_lost=heard.lose, seals=seals)
    )


def _hang_up(channel: Sequence[Channel]) -> None:
    channel[0].close()


class Heard:
    """What one rank was told by rank 0. Written on the thread of the loop, read on any.

    Attributes:
        lost: why the connection broke, "" while it is there.
        awaited: the rounds whose answer is kept when it comes.
        answers: those that came and were not taken yet.
        firsts: the rounds in which this rank waits as the first, and rank 0 still has not come.
    """

    def __init__(self, bell: Bell) -> None:
        self.lost = ""
        self._bell = bell
        self._errors: dict[tuple[int, str], bytes] = {}
        self.answers: dict[tuple[int, str], bytes] = {}
        self.awaited: set[tuple[int, str]] = set()
        self.firsts: set[tuple[int, str]] = set()
        self._notes: dict[tuple[int, str], bytes] = {}
        self._left: set[int] = set()

    def error(self, job: int, name: str) -> bytes | None:
        """Return the error with which a round ended."""
        return self._errors.get((job, name))

    def answer(self, job: int, name: str) -> bytes | None:
        """Return the answer of a round that is awaited."""
        return self.answers.get((job, name))

    def is_first(self, job: int, name: str) -> bool:
        """Whether this rank was the first that came to a round, and rank 0 still has not."""
        return (job, name) in self.firsts

    def note(self, job: int, name: str) -> bytes | None:
        """Return what rank 0 has put up."""
        return self._notes.get((job, name))

    def has_left(self, job: int) -> bool:
        """Whether rank 0 has left the job."""
        return job in self._left

    def wait_for(self, job: int, name: str) -> None:
        """Keep the answer of a round when it comes; no other is kept."""
        self.awaited.add((job, name))

    def forget(self, job: int, name: str) -> None:
        """Keep no answer of a round."""
        self.awaited.discard((job, name))
        self.answers.pop((job, name), None)
        self.firsts.discard((job, name))

    def leave(self, job: int) -> None:
        """Forget what was heard in a job that this rank has left."""
        for known in (self._errors, self._notes):
            for key in [key for key in tuple(known) if key[0] == job]:
                known.pop(key, None)

    def take(self, body: bytes) -> None:
        """Take in what rank 0 says."""
        frame = unpacked(body)
        key = (frame.job, frame.name)
        if frame.kind == "answer":
            # One that nobody waits for any more would be kept for ever.
            if key in self.awaited:
                self.answers[key] = frame.data
        elif frame.kind == "fail":
            self._errors[key] = frame.data
        elif frame.kind == "note":
            self._notes[key] = frame.data
        elif frame.kind == "leave":
            self._left.add(frame.job)
        elif frame.kind == "first":
            self.firsts.add(key)
        elif frame.kind == "here":
            self.firsts.discard(key)
        self._bell.ring()

    def lose(self, reason: str) -> None:
        """Note that the connection broke."""
        self.lost = reason
        self._bell.ring()


class JobCoordinator:
    """One of several ranks of a job. Two of them, on two threads, may share a link.

    Attributes:
        rank: this one.
        world_size: how many there are.
        link: what connects this rank with the others.
    """

    def __init__(self, link: Hub | Line, job: int = 0) -> None:
        """Join a job.

        Args:
            link: what connects this rank with the others.
            job: its number, the same on every rank.
        """
        self.rank = link.rank
        self.world_size = link.world_size
        self.link = link
        self._job = job
        self._asked: Mapping[str, str] = {}

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        """Take part in one round; see `Coordinator.round`."""
        try:
            if isinstance(self.link, Hub):
                return self._lead(self.link, topic, message, decide, deadline)
            return self._follow(self.link, topic, message, deadline)
        except CheckpointError as error:
            if isinstance(message, CheckpointError):
                raise error from message  # what crossed to another rank has lost its traceback
            if isinstance(message, BaseException):
                raise noted(topic.label, message) from None
            raise

    def verdict(self, topic: Topic) -> CheckpointError | None:
        """Return the error with which the round ended; see `Coordinator.verdict`."""
        if isinstance(self.link, Hub):
            data = self.link.board.error(self._job, topic.key)
        else:
            lost = self.link.heard.lost  # first: what rank 0 said before that holds
            data = self.link.heard.error(self._job, topic.key)
            if data is None and lost:
                return self._lost(topic.label, self.link)
        return None if data is None else decode_error(data)

    def refuse(self, topic: Topic, error: CheckpointError) -> None:
        """Give the round up on every rank; see `Coordinator.refuse`."""
        self.link.send(self._failed(topic, error))

    def beside(self, topic: Topic, work: Callable[[], _T], let_go: Callable[[_T], None]) -> _T:
        """Do what waits for other ranks; see `Coordinator.beside`."""
        bell = self.link.bell
        making = Making(work, bell.ring)
        try:
            if bell.wait_for(lambda: making.is_over or self._in_vain(topic)) is not True:
                bell.wait_for(lambda: making.is_over, _GRACE_SECONDS)
            error = None if making.is_over else self._in_vain(topic)
            if error is not None:
                raise error
            return making.take()
        except BaseException:
            making.give_up(let_go)
            raise

    def post(self, name: str, data: bytes) -> None:
        """Put a note up; see `Coordinator.post`."""
        self._check_connected(f"the note {name!r}")
        self.link.send(Frame("note", self._job, name, data))

    def look(self, name: str) -> bytes | None:
        """Return a note; see `Coordinator.look`."""
        if isinstance(self.link, Hub):
            return self.link.board.note(self._job, name)
        found = self.link.heard.note(self._job, name)
        if found is None:
            self._check_connected(f"the note {name!r}")
        return found

    def wait_for(self, look: Callable[[], _T], deadline: Deadline) -> _T:
        """Wait for what is heard; see `Coordinator.wait_for`."""
        return self.link.bell.wait_for(look, deadline.remaining_seconds)

    def leave(self, deadline: Deadline) -> None:
        """Leave; rank 0 waits for the others until the deadline, then goes without them."""
        self.link.send(Frame("leave", self._job))
        if isinstance(self.link, Hub):
            # Not for those that were named absent: most likely they are dead, and whoever is merely
            # late has been told by an error already.
            self.wait_for(partial(self.link.board.is_over, self._job), deadline)
        else:
            self.link.heard.leave(self._job)
            # A process that ends right now would take along what has not left.
            self.link.wait_until_sent(deadline.remaining_seconds)

    def _in_vain(self, topic: Topic) -> CheckpointError | None:
        """Return why a round that is still to come will fail, None where it may succeed."""
        if isinstance(self.link, Hub):
            left, lost = self.link.board.left(self._job), self.link.board.lost.copy()
        else:
            left, lost = {0} if self.link.heard.has_left(self._job) else set[int](), set[int]()
        # Asked first and heeded last: what was said before holds.
        said = self.verdict(topic)
        if said is None and (left or lost):
            return absence(topic.label, left=left, lost=lost - left)
        return said

    def _follow(
        self, line: Line, topic: Topic, message: bytes | BaseException, deadline: Deadline
    ) -> bytes:
        heard, job, name = line.heard, self._job, topic.key

        def outcome() -> list[bytes]:
            # Asked first and heeded last: what rank 0 said before it went holds, and both may be
            # heard between two of these lines.
            left, lost = heard.has_left(job), heard.lost
            error = heard.error(job, name)
            if error is not None:
                raise decode_error(error)
            answer = heard.answer(job, name)
            if answer is None and left:
                raise absence(topic.label, left={0})
            if answer is None and lost:
                raise self._lost(topic.label, line)
            return [] if answer is None else [answer]  # which may be empty, and is one

        heard.wait_for(job, name)
        try:
            if topic.asked != self._asked:  # told ahead of the message, for whoever looks there
                self._asked, said = topic.asked, msgspec.msgpack.encode(topic.asked)
                line.send(Frame("note", job, asked_by(self.rank), said))
            line.send(self._message(topic, message))
            waiting = Waiting(
                topic.label,
                deadline.remaining_seconds,
                # One word for all that wait for rank 0, which names the others once it is here.
                lambda: (0,) if heard.is_first(job, name) else (),
                says=topic.opens,
            )
            answers = waiting.wait_for(line.bell, outcome)
        finally:
            heard.forget(job, name)
        if not answers:
            raise CoordinationError(
                f"{topic.label}: rank 0 did not answer within {deadline.span_seconds:g} s"
                f"{topic.hint}",
                kind=ErrorKind.TIMEOUT,
                ranks={0: "no answer"},
            )
        return answers[0]

    def _lead(
        self,
        hub: Hub,
        topic: Topic,
        message: bytes | BaseException,
        decide: Decide,
        deadline: Deadline,
    ) -> bytes:
        """Rank 0: gather, decide, answer. Whatever goes wrong becomes everybody's error."""
        try:
            hub.send(self._message(topic, message))
            answer = decide(self._gather(hub, topic, deadline.for_coordinator()))
            # One copy for all where it is one: an index a thousand times would not fit into memory.
            outcome = self._answer(topic, answer)
        except BaseException as error:
            known = error if isinstance(error, CheckpointError) else failure(topic.label, 0, error)
            hub.end(self._job, topic.key, self._frame("fail", topic, encode_error(known)))
            noted(topic.label, error)
            raise  # as it is, also an interrupt: it stops this rank, and the others have been told
        hub.end(self._job, topic.key, outcome)
        return answer if isinstance(answer, bytes) else answer[0]

    def _gather(self, hub: Hub, topic: Topic, deadline: Deadline) -> list[bytes]:
        board, job, name = hub.board, self._job, topic.key

        def missing() -> set[int]:
            # Sets and dicts of the board are copied in one operation: it changes meanwhile.
            return set(range(self.world_size)) - board.messages(job, name).keys()

        def is_settled() -> bool:
            error = board.error(job, name)
            if error is not None:
                raise decode_error(error)
            return board.count(job, name) == self.world_size

        def is_in_vain() -> bool:
            gone = board.left(job) | board.lost
            # Asked before the messages: what a rank sent before it left counts.
            return is_settled() or bool(gone & missing()) or bool(board.apart(job, name))

        # Its own word first, which no deadline concerns: else rank 0 might find itself absent.
        hub.bell.wait_for(lambda: board.error(job, name) is not None or 0 not in missing())
        waiting = Waiting(topic.label, deadline.remaining_seconds, missing, says=topic.opens)
        waiting.wait_for(hub.bell, is_in_vain)
        self._check_together(hub, topic)
        if not is_settled() and board.lost & missing():
            grace = min(_GRACE_SECONDS, deadline.remaining_seconds)
            hub.bell.wait_for(lambda: is_settled() or missing() <= board.lost, grace)
        left, lost = board.left(job), board.lost.copy()
        messages = board.messages(job, name)
        absent = set(range(self.world_size)) - messages.keys()
        if absent:
            is_settled()  # an error that came meanwhile says more
            gone = absent & (left | lost)
            # So that leaving the job does not wait for them a second time.
            hub.name_absent(job, gone or absent)
            if gone:  # the others may well be on their way
                raise absence(topic.label, left=gone & left, lost=gone - left)
            raise absence(
                topic.label, silent=absent, span_seconds=deadline.span_seconds, hint=topic.hint
            )
        return [messages[rank] for rank in range(self.world_size)]

    def _check_together(self, hub: Hub, topic: Topic) -> None:
        """Rank 0: check that nobody waits in another round of the call, which would be for ever."""
        others = hub.board.apart(self._job, topic.key)
        if others:
            notes = {rank: hub.board.note(self._job, asked_by(rank)) for rank in others}
            error = apart(topic.label, topic.asked, notes)
            # They wait in rounds of their own, which nobody else would end.
            for name in set(others.values()):
                hub.end(self._job, name, Frame("fail", self._job, name, encode_error(error)))
            raise error

    def _message(self, topic: Topic, message: bytes | BaseException) -> Frame:
        if isinstance(message, bytes) and len(message) > MESSAGE_LIMIT_BYTES:
            message = _too_long(message)
        if isinstance(message, BaseException):
            return self._failed(topic, message)
        return self._frame("report", topic, message)

    def _answer(self, topic: Topic, answer: bytes | Sequence[bytes]) -> Frame | list[Packed]:
        for data in [answer] if isinstance(answer, bytes) else answer:
            if len(data) > MESSAGE_LIMIT_BYTES:
                raise _too_long(data)
        if isinstance(answer, bytes):
            return self._frame("answer", topic, answer)
        # Packed on this thread: the loop has others to serve.
        return [packed(self._frame("answer", topic, data)) for data in answer]

    def _failed(self, topic: Topic, error: BaseException) -> Frame:
        """Return what ends the round, with the error as all others are to raise it."""
        # By way of plain data: a class of a backend becomes the class of ours that it is.
        known = failure(topic.label, self.rank, from_wire(to_wire(error)))
        return self._frame("fail", topic, encode_error(known))

    def _frame(self, kind: FrameKind, topic: Topic, data: bytes) -> Frame:
        return Frame(kind, self._job, topic.key, data)

    def _check_connected(self, what: str) -> None:
        if isinstance(self.link, Line) and self.link.heard.lost:
            raise self._lost(what, self.link)

    def _lost(self, what: str, line: Line) -> CoordinationError:
        return CoordinationError(
            f"{what}: the connection to rank 0 was lost, it probably died ({line.heard.lost})",
            kind=ErrorKind.PEER_ABSENT,
            ranks=LOST,
        )


def _too_long(data: bytes) -> ValueError:
    return ValueError(
        f"{len(data)} bytes are more than the {MESSAGE_LIMIT_BYTES} that one message may have"
    )
