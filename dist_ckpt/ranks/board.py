"""What the ranks of a job have said to rank 0, and what each is told of it; without any connection.

Ranks send what they have to say once, and are told once how a round ended: nobody asks. The board
is changed on one thread alone, in the order in which things are heard; whoever decides on rank 0
looks at it from a thread of its own, and is woken when it is worth a look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from dist_ckpt.ranks.channels import Frame, packed
from dist_ckpt.ranks.seals import Packed
from dist_ckpt.threads import Bell


@dataclass(slots=True)
class Gathering:
    """A round that is not over.

    Attributes:
        messages: what has come, by rank.
        first: the first rank that came, where rank 0 was not there.
        refused: the error of a rank that gave the round up after all had come; rank 0 may still
            heed it before it decides.
    """

    messages: dict[int, bytes] = field(default_factory=dict)
    first: int | None = None
    refused: bytes | None = None


# Rounds that ended well are remembered for a while: a word about one may still be under way.
_REMEMBERED = 64


@dataclass(slots=True)
class JobBoard:
    """What is known of one job.

    Attributes:
        rounds: those that are not over.
        errors: of the rounds that failed.
        decided: the last ones that ended well.
        notes: of other ranks, for rank 0.
        told: the notes of rank 0, for all.
        left: the ranks that say nothing more.
        absent: those that did not come, and need not be waited for.
        latest: for each rank, the round that it came to last.
        refused: by call the error of a rank that failed before any round of it: whichever round
            of that call the others come to, the rank will not.
    """

    rounds: dict[str, Gathering] = field(default_factory=dict)
    errors: dict[str, bytes] = field(default_factory=dict)
    decided: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    notes: dict[str, bytes] = field(default_factory=dict)
    told: dict[str, bytes] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    latest: dict[int, str] = field(default_factory=dict)
    refused: dict[str, bytes] = field(default_factory=dict)


class Board:
    """What the ranks have said, without any connection.

    Args:
        world_size: how many ranks there are.
        tell: sends a frame to a rank; with a name, in the place of one that has not left yet.
        bell: rung when whoever waits on rank 0 should look.

    Attributes:
        lost: the ranks whose connection broke.
        jobs: what is known of each job, by its number, until all ranks have left it.
    """

    def __init__(
        self, world_size: int, tell: Callable[[int, Packed, str | None], None], bell: Bell
    ) -> None:
        self.lost: set[int] = set()
        self._world_size = world_size
        self._others = range(1, world_size)
        self._tell = tell
        self._bell = bell
        self.jobs: dict[int, JobBoard] = {}
        self._over: set[int] = set()

    # Looked at by the threads of rank 0, each in operations that no other thread sees half done.

    def error(self, job: int, name: str) -> bytes | None:
        """Return the error of a round, be it one that rank 0 has not heeded yet."""
        board = self.jobs.get(job)
        if board is None:
            return None
        gathering = board.rounds.get(name)
        return board.errors.get(name) or (None if gathering is None else gathering.refused)

    def count(self, job: int, name: str) -> int:
        """Return how many messages have come to a round."""
        board = self.jobs.get(job)
        gathering = None if board is None else board.rounds.get(name)
        return 0 if gathering is None else len(gathering.messages)

    def messages(self, job: int, name: str) -> dict[int, bytes]:
        """Return what has come to a round."""
        board = self.jobs.get(job)
        gathering = None if board is None else board.rounds.get(name)
        return {} if gathering is None else gathering.messages.copy()

    def apart(self, job: int, name: str) -> dict[int, str]:
        """Return the ranks that will never come to a round, each with the one that it waits in.

        That is another round of the same call, and it is not over: it waits for rank 0 in turn.
        """
        board = self.jobs.get(job)
        if board is None or len(board.rounds) < 2:  # mostly: looked at whenever the bell rings
            return {}
        gathering, rounds = board.rounds.get(name), board.rounds.copy()
        came = {} if gathering is None else gathering.messages.copy()
        return {
            rank: other
            for rank, other in board.latest.copy().items()
            if rank not in came and other in rounds and _is_same_call(other, name)
        }

    def note(self, job: int, name: str) -> bytes | None:
        """Return what another rank has put up for rank 0."""
        board = self.jobs.get(job)
        return None if board is None else board.notes.get(name)

    def left(self, job: int) -> set[int]:
        """Return the ranks that have left the job."""
        board = self.jobs.get(job)
        return set() if board is None else board.left.copy()

    def is_over(self, job: int) -> bool:
        """Whether nobody is left to wait for: all have gone, or were named absent."""
        board = self.jobs.get(job)
        if board is None:
            return job in self._over
        return 0 in board.left and self._all_gone(board, board.absent)

    def _all_gone(self, board: JobBoard, absent: Collection[int] = ()) -> bool:
        if len(board.left) == self._world_size:
            return True
        if not self.lost and not absent:
            return False
        return len(board.left | self.lost | set(absent)) == self._world_size

    # What happens, on the thread of the loop.

    def take(self, rank: int, frame: Frame) -> None:
        """Take in what `rank` says.

        Raises:
            ValueError: no rank may say that.
        """
        # It was on its way when the last had left: nobody is there for what it would change.
        if frame.job in self._over:
            return
        board = self.jobs.setdefault(frame.job, JobBoard())
        if frame.kind == "report":
            self._report(board, rank, frame)
        elif frame.kind == "fail":
            self._fail(board, rank, frame)
        elif frame.kind == "leave":
            self._leave(board, rank, frame)
        elif frame.kind == "note" and rank == 0:
            # Kept as well, for a rank that is not connected yet: `join` tells it.
            board.told[frame.name] = frame.data
            self._tell_all(board, frame)
        elif frame.kind == "note":
            board.notes[frame.name] = frame.data
            self._bell.ring()
        else:
            raise ValueError(f"no rank says {frame.kind}")

    def end(self, job: int, name: str, outcome: Frame | Sequence[Packed]) -> None:
        """End a round as rank 0 decided: by one frame for all, or by a packed one for each rank."""
        board = self.jobs.setdefault(job, JobBoard())
        # What came first holds: a second end, be it an error, changes nothing for anybody.
        if name in board.errors or name in board.decided:
            return
        if isinstance(outcome, Frame) and outcome.kind == "fail":
            # First: who finds no round any more finds why.
            board.errors[name] = outcome.data
        else:
            board.decided.append(name)
        board.rounds.pop(name, None)
        if isinstance(outcome, Frame):
            self._tell_all(board, outcome)
        else:
            for rank in self._others:
                self._tell(rank, outcome[rank], None)
        self._bell.ring()

    def name_absent(self, job: int, ranks: Collection[int]) -> None:
        """Note that nobody has to wait for `ranks` any more, until they say something."""
        self.jobs.setdefault(job, JobBoard()).absent.update(ranks)

    def join(self, rank: int) -> None:
        """Note that `rank` is connected, and tell it what all were told before."""
        self.lost.discard(rank)
        for job, board in self.jobs.items():
            for name, error in board.errors.items():
                self._tell(rank, packed(Frame("fail", job, name, error)), None)
            for name, data in board.told.items():
                self._tell(rank, packed(Frame("note", job, name, data)), name)
            if 0 in board.left:  # last: what rank 0 said before holds
                self._tell(rank, packed(Frame("leave", job)), None)

    def lose(self, rank: int) -> None:
        """Note that the connection of `rank` broke."""
        self.lost.add(rank)
        # Of a copy, as a job that this makes end is taken out.
        for job, board in list(self.jobs.items()):
            self._forget_if_over(board, job)
        self._bell.ring()

    def _report(self, board: JobBoard, rank: int, frame: Frame) -> None:
        # It was only late: who leaves the job waits for it again.
        board.absent.discard(rank)
        if frame.name in board.errors:
            return  # it was told, when that was or when it connected
        refusal = board.refused.get(_call_of(frame.name))
        if refusal is not None and frame.name not in board.decided:
            self.end(frame.job, frame.name, Frame("fail", frame.job, frame.name, refusal))
            return
        gathering = board.rounds.setdefault(frame.name, Gathering())
        gathering.messages[rank] = frame.data
        board.latest[rank] = frame.name
        if rank == 0:
            if gathering.first is not None:
                self._tell(gathering.first, packed(Frame("here", frame.job, frame.name)), None)
        elif gathering.first is None and 0 not in gathering.messages:
            gathering.first = rank
            self._tell(rank, packed(Frame("first", frame.job, frame.name)), None)
        # Rank 0 looks once more when it is there: what happened until now has rung for nobody.
        elsewhere = any(
            0 in each.messages
            for name, each in board.rounds.items()
            if name != frame.name and _is_same_call(name, frame.name)
        )
        if rank == 0 or elsewhere or len(gathering.messages) == self._world_size:
            self._bell.ring()

    def _fail(self, board: JobBoard, rank: int, frame: Frame) -> None:
        board.absent.discard(rank)
        if frame.name in board.errors or frame.name in board.decided:
            return  # it was told, or the round was decided before
        gathering = board.rounds.get(frame.name)
        if gathering is not None and len(gathering.messages) == self._world_size:
            # All have come, and rank 0 decides by itself from there on: it may be committing.
            gathering.refused = gathering.refused or frame.data
            self._bell.ring()
            return
        # The first error ends the round: waiting for more would only delay everybody.
        self.end(frame.job, frame.name, frame)
        call = _call_of(frame.name)
        if call and _call_of(board.latest.get(rank, "")) != call:
            # Its first word of the call, so it does not know by which rounds the others go.
            board.refused[call] = frame.data
            for name in [name for name in board.rounds if _call_of(name) == call]:
                self.end(frame.job, name, Frame("fail", frame.job, name, frame.data))

    def _leave(self, board: JobBoard, rank: int, frame: Frame) -> None:
        board.left.add(rank)
        if rank == 0:
            self._tell_all(board, frame)
        # It will come to no round that is open, so rank 0 may be waiting in vain by now.
        gone = self._all_gone(board, board.absent)
        if gone or any(rank not in each.messages for each in board.rounds.values()):
            self._bell.ring()
        self._forget_if_over(board, frame.job)

    def _forget_if_over(self, board: JobBoard, job: int) -> None:
        if 0 in board.left and self._all_gone(board):
            # Before it is forgotten: a late frame would begin it anew.
            self._over.add(job)
            self.jobs.pop(job, None)
            self._bell.ring()

    def _tell_all(self, board: JobBoard, frame: Frame) -> None:
        # Once for all: an index times a thousand ranks would not fit into memory.
        data, name = packed(frame), f"{frame.job}/{frame.name}" if frame.kind == "note" else None
        for rank in self._others:
            if rank not in board.left:
                self._tell(rank, data, name)


def _is_same_call(name: str, other: str) -> bool:
    """Whether two rounds are of calls with one number: each rank counts those that it makes."""
    return _call_of(name) == _call_of(other) != ""


def _call_of(name: str) -> str:
    """Return the number of the call that a round belongs to, "" where it has none."""
    return "".join(name.split("/")[1:2])
