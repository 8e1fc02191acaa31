"""What each rank is told of what all say, in whatever order that is heard."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.ranks.board import Board
from dist_ckpt.ranks.channels import Frame, unpacked
from dist_ckpt.ranks.seals import Packed
from dist_ckpt.threads import Bell

JOB = 3
ROUND = "round"


class Told:
    """A board, and what it told each rank."""

    def __init__(self, world_size: int) -> None:
        self.frames: dict[int, list[Frame]] = defaultdict(list)
        self.board = Board(world_size, self.tell, Bell())

    def tell(self, rank: int, data: Packed, name: str | None) -> None:
        self.frames[rank].append(unpacked(data.body))

    def say(self, rank: int, kind: str, name: str = ROUND, data: bytes = b"") -> None:
        self.board.take(rank, Frame(kind, JOB, name, data))  # type: ignore[arg-type]

    def kinds(self, rank: int) -> list[str]:
        return [frame.kind for frame in self.frames[rank]]


EVENTS = st.sampled_from(["report", "fail", "leave", "lose", "join"])


@given(st.integers(2, 5), st.data())
def test_everybody_hears_of_one_end(world_size: int, data: st.DataObject) -> None:
    told = Told(world_size)
    board = told.board
    ranks = st.integers(0, world_size - 1)
    reported: set[int] = set()
    left: set[int] = set()
    first_error = b""
    for number in range(data.draw(st.integers(0, 15))):
        rank, event = data.draw(ranks), data.draw(EVENTS)
        if rank in left or (event in ("lose", "join") and rank == 0):
            continue
        if event == "lose":
            board.lose(rank)
        elif event == "join":
            told.frames[rank].clear()
            board.join(rank)
        elif event == "leave":
            left.add(rank)
            told.say(rank, "leave", "")
        elif event == "report" and rank not in reported:
            reported.add(rank)
            told.say(rank, "report", data=bytes([rank]))
        elif event == "fail":
            error = b"error %d" % number
            complete = len(reported) == world_size
            first_error = first_error or (b"" if complete else error)
            told.say(rank, "fail", data=error)
        if board.jobs.get(JOB) is None:
            return  # all have gone, and nobody has anything to ask
    if first_error:
        assert board.error(JOB, ROUND) == first_error
    elif board.error(JOB, ROUND) is not None:
        assert len(reported) == world_size, "a refusal that rank 0 may heed"
    else:
        assert board.messages(JOB, ROUND).keys() == reported
    for rank in set(range(1, world_size)) - left:
        ends = [frame for frame in told.frames[rank] if frame.kind in ("fail", "answer")]
        assert [frame.data for frame in ends] == ([first_error] if first_error else [])
    # However it went, the word of rank 0 is the last one about it.
    board.end(JOB, ROUND, Frame("answer", JOB, ROUND, b"answer"))
    for rank in set(range(1, world_size)) - left:
        assert told.frames[rank][-1].data == (first_error or b"answer") or 0 in left
        assert sum(frame.kind in ("fail", "answer") for frame in told.frames[rank]) == 1
    board.end(JOB, ROUND, Frame("fail", JOB, ROUND, b"another"))
    assert board.error(JOB, ROUND) == (first_error or None)


def test_the_first_that_waits_for_rank_0_is_told_so_and_when_it_is_there() -> None:
    told = Told(4)
    for rank in (2, 1, 0, 3):
        told.say(rank, "report")
    assert told.kinds(2) == ["first", "here"]
    assert told.kinds(1) == told.kinds(3) == []
    told = Told(2)
    told.say(0, "report")
    told.say(1, "report")
    assert told.kinds(1) == [], "rank 0 is there already"


def test_who_connects_hears_errors_notes_and_then_that_rank_0_has_left() -> None:
    told = Told(3)
    told.say(0, "note", "word", b"1")
    told.say(0, "fail", data=b"error")
    told.say(0, "note", "word", b"2")
    told.say(0, "leave", "")
    told.frames.clear()
    told.board.join(2)
    assert [(frame.kind, frame.data) for frame in told.frames[2]] == [
        ("fail", b"error"),
        ("note", b"2"),
        ("leave", b""),
    ]


def test_a_job_that_all_have_left_is_forgotten() -> None:
    told = Told(3)
    told.say(0, "fail", data=b"error")
    for rank in (1, 0):
        told.say(rank, "leave", "")
    assert not told.board.is_over(JOB)
    told.board.lose(2)
    assert told.board.is_over(JOB)
    told.say(2, "report")
    assert told.board.jobs == {}


@pytest.mark.parametrize("kind", ["answer", "first", "here"])
def test_what_no_rank_may_say_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"no rank says {kind}"):
        Told(2).say(1, kind)


def test_who_fails_before_any_round_of_a_call_ends_the_one_that_others_come_to() -> None:
    told = Told(3)
    told.say(1, "report", "ask/7/newer")
    told.say(2, "fail", "load/7/choose", b"error")
    told.say(0, "report", "ask/7/newer")
    assert [(frame.name, frame.data) for frame in told.frames[1] if frame.kind == "fail"] == [
        ("load/7/choose", b"error"),
        ("ask/7/newer", b"error"),
    ]
    told.say(0, "report", "ask/7/hosts")  # who comes later, to whatever round of it
    assert told.board.error(JOB, "ask/7/hosts") == b"error"
    assert told.board.error(JOB, "load/8/choose") is None


def test_who_fails_within_a_call_ends_that_round_alone() -> None:
    told = Told(2)
    for name, kind in (("load/7/choose", "report"), ("load/7/fits", "fail")):
        told.say(1, kind, name, b"damaged")
    told.say(0, "report", "load/7/gone")
    assert told.board.error(JOB, "load/7/fits") == b"damaged"
    assert told.board.error(JOB, "load/7/gone") is None
