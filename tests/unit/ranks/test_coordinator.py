"""Rounds: one decision for all, the first error ends them, and the absent are named."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    FencedError,
    IntegrityError,
    StorageError,
    UsageError,
)
from dist_ckpt.ranks import coordinator as coordinator_module
from dist_ckpt.ranks.board import JobBoard
from dist_ckpt.ranks.coordinator import Heard, JobCoordinator, Line
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rounds import Deadline, Decide, SoloCoordinator, Topic
from tests.unit.ranks.rounds import hub_of, line_to, links, long, members, on_every_rank, topic


def concat(messages: Sequence[bytes]) -> bytes:
    return b"|".join(messages)


def never(messages: Sequence[bytes]) -> bytes:
    raise AssertionError("must not be asked")


def board_of(member: JobCoordinator) -> JobBoard:
    """Return what rank 0 knows of the job."""
    return cast(Hub, member.link).board.jobs[0]


def heard_by(member: JobCoordinator) -> Heard:
    """Return what another rank has heard."""
    return cast(Line, member.link).heard


def heard(member: JobCoordinator, name: str, *, unlike: bytes = b"") -> bytes | None:
    """Return a note when it has come; not an older one."""

    def look() -> bytes | None:
        found = member.look(name)
        return None if found == unlike else found

    return member.wait_for(look, long())


def round_of(
    job: Sequence[JobCoordinator],
    messages: Sequence[bytes | BaseException],
    decide: Decide,
    *,
    key: str = "round",
) -> list[bytes | BaseException]:
    """Let the first `len(messages)` members take part in one round."""

    def work(rank: int) -> Callable[[], bytes]:
        return lambda: job[rank].round(topic(key), messages[rank], decide, deadline=long())

    return on_every_rank([work(rank) for rank in range(len(messages))])


def errors_of(results: Sequence[object]) -> list[CheckpointError]:
    found = [result for result in results if isinstance(result, CheckpointError)]
    assert len(found) == len(results), results
    return found


def test_all_hear_one_answer_over_the_messages_by_rank() -> None:
    job = members(5)
    assert round_of(job, [b"a", b"b", b"", b"d", b"e"], concat) == [b"a|b||d|e"] * 5


def test_each_may_have_an_answer_of_its_own() -> None:
    job = members(3)
    decide: Decide = lambda messages: [bytes([n]) + m for n, m in enumerate(messages)]  # noqa: E731
    assert round_of(job, [b"a", b"b", b"c"], decide) == [b"\0a", b"\1b", b"\2c"]


def test_large_messages_and_answers_pass() -> None:
    large = bytes(range(256)) * ((9 << 20) // 256) + b"end"
    assert round_of(members(2), [b"small", large], concat) == [b"small|" + large] * 2


@given(st.integers(2, 5), st.data())
def test_an_error_of_a_rank_is_everybodys_at_once(world_size: int, data: st.DataObject) -> None:
    # One of the others never comes: who waited for it would wait for an hour.
    failing = data.draw(st.integers(0, world_size - 2))
    messages: list[bytes | BaseException] = [b"fine"] * (world_size - 1)
    messages[failing] = StorageError("disk full", kind=ErrorKind.STORAGE_FULL)
    # The error arrives first, as nobody can be heard who has not yet arrived.
    job = members(world_size)
    first = threading.Event()

    def work(rank: int) -> bytes:
        if rank != failing:
            first.wait()
        try:
            if rank == failing != 0:
                first.set()
            return job[rank].round(topic(), messages[rank], never, deadline=long())
        finally:
            first.set()

    results = on_every_rank([lambda rank=rank: work(rank) for rank in range(world_size - 1)])  # type: ignore[misc]
    for error in errors_of(results):
        assert type(error) is StorageError
        assert str(error) == f"the round failed on rank {failing}: disk full"
        assert (error.kind, error.ranks) == (ErrorKind.STORAGE_FULL, {failing: "disk full"})


def test_the_rank_where_it_began_keeps_the_traceback() -> None:
    cause = StorageError("disk full")
    results = errors_of(round_of(members(2), [b"", cause], never))
    assert results[1].__cause__ is cause
    assert results[0].__cause__ is None


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (FencedError("claim 1 was superseded"), "claim 1 was superseded"),
        (KeyError("w"), "the round failed on rank 0: KeyError: 'w'"),
    ],
)
def test_a_decision_that_fails_is_everybodys_error(raised: Exception, says: str) -> None:
    def decide(messages: Sequence[bytes]) -> bytes:
        raise raised

    results = round_of(members(3), [b""] * 3, decide)
    assert results[0] is raised
    others = errors_of(results[1:])
    assert [str(error) for error in others] == [says] * 2
    ours = isinstance(raised, CheckpointError)
    assert {type(error) for error in others} == {type(raised) if ours else CoordinationError}


def test_a_foreign_error_keeps_its_class_on_its_own_rank() -> None:
    cause = KeyError("w")
    results = round_of(members(3), [b"", cause, b""], never)
    assert results[1] is cause
    assert cause.__notes__ == ["the round failed"]
    for error in errors_of([results[0], results[2]]):
        assert type(error) is CoordinationError
        assert error.ranks == {1: "KeyError: 'w'"}


def test_an_interrupt_of_rank_0_is_told_to_the_others() -> None:
    def decide(messages: Sequence[bytes]) -> bytes:
        raise KeyboardInterrupt

    results = round_of(members(3), [b""] * 3, decide)
    assert isinstance(results[0], KeyboardInterrupt)
    for error in errors_of(results[1:]):
        assert error.ranks == {0: "KeyboardInterrupt"}


def soon() -> Deadline:
    return Deadline.after(0.3)


def test_who_does_not_arrive_is_named_on_every_rank() -> None:
    job = members(4)
    board = cast(Hub, job[0].link).board

    def lead() -> bytes:
        # The short time begins when rank 1 is there, however long that takes.
        job[0].wait_for(lambda: board.count(0, topic().key), long())
        return job[0].round(topic(), b"", never, deadline=soon())

    results = on_every_rank([lead, lambda: job[1].round(topic(), b"", never, deadline=long())])
    for error in errors_of(results):
        assert (error.kind, error.ranks) == (
            ErrorKind.PEER_ABSENT,
            {2: "did not arrive", 3: "did not arrive"},
        )
        assert "rank 2, 3 did not arrive within 0.3 s" in str(error)
    # Who comes late is told at once, whatever its own deadline.
    with pytest.raises(CoordinationError, match="rank 2, 3 did not arrive"):
        job[3].round(topic(), b"late", never, deadline=long())


def test_without_rank_0_the_others_say_so() -> None:
    job = members(3)
    with pytest.raises(CoordinationError, match=r"rank 0 did not answer within 0\.3 s") as caught:
        job[1].round(topic(), b"", never, deadline=soon())
    assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.TIMEOUT, [0])


def test_a_verdict_is_the_error_of_a_round_and_never_waits() -> None:
    job = members(2)
    assert job[1].verdict(topic()) is None
    round_of(job, [b"", b""], concat, key="good")
    assert job[1].verdict(topic("good")) is None
    round_of(job, [b"", IntegrityError("bad")], never)
    verdict = job[1].verdict(topic())
    assert isinstance(verdict, IntegrityError)
    assert list(verdict.ranks) == [1]
    assert SoloCoordinator().verdict(topic()) is None


def test_what_a_round_left_is_forgotten_with_it() -> None:
    job = members(3)
    for number in range(100):
        each: Decide = lambda messages: list(messages)  # noqa: E731
        round_of(job, [b"x"] * 3, concat if number % 2 else each, key=f"round-{number}")
    board = board_of(job[0])
    assert board.rounds == {}
    assert len(board.decided) < 100
    for member in job[1:]:
        heard = heard_by(member)
        assert (heard.answers, heard.awaited, heard.firsts) == ({}, set(), set())


def test_failed_rounds_leave_their_error_and_no_messages() -> None:
    job = members(2)
    for number in range(5):
        round_of(job, [b"x" * 1000, StorageError("no")], never, key=f"round-{number}")
    board = board_of(job[0])
    assert sorted(board.errors) == [f"round-{number}" for number in range(5)]
    # The first to arrive may be the failing rank, whose error ended the round already.
    assert board.rounds == {}


def test_a_lost_connection_is_the_loss_of_rank_0() -> None:
    hub = hub_of(2)
    member = JobCoordinator(line_to(hub, 1))
    ends: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(CoordinationError) as caught:
            member.round(topic(), b"", never, deadline=long())
        ends.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    del hub  # nobody uses it any more: it closes
    waiting.join()
    (error,) = ends
    assert isinstance(error, CoordinationError)
    assert "connection to rank 0 was lost" in str(error)
    assert (error.kind, list(error.ranks)) == (ErrorKind.PEER_ABSENT, [0])
    with pytest.raises(CoordinationError, match="connection to rank 0 was lost"):
        member.round(topic("next"), b"", never, deadline=long())
    with pytest.raises(CoordinationError, match="connection to rank 0 was lost"):
        member.post("note", b"")
    with pytest.raises(CoordinationError, match="connection to rank 0 was lost"):
        member.look("note")
    verdict = member.verdict(topic())
    assert verdict is not None
    assert verdict.kind == ErrorKind.PEER_ABSENT
    member.leave(long())  # there is nobody to tell, which is no error


def test_rank_0_leaves_last() -> None:
    job = members(3)
    left: list[int] = []

    def leave(rank: int) -> None:
        job[rank].leave(long())
        left.append(rank)

    first = threading.Thread(target=leave, args=(0,))
    first.start()
    # It is told that rank 0 has left, and whoever waits for rank 0 hears of it.
    with pytest.raises(CoordinationError, match="rank 0 did not arrive and never will"):
        job[1].round(topic(), b"", never, deadline=long())
    leave(1)
    assert first.is_alive()
    leave(2)
    first.join()
    assert sorted(left) == [0, 1, 2]


def test_rank_0_does_not_wait_for_those_it_named_absent() -> None:
    hub, *lines = links(3)
    training, writer = (JobCoordinator(hub) for _ in range(2))
    with pytest.raises(CoordinationError, match="rank 1, 2 did not arrive"):
        writer.round(topic(), b"", lambda _: b"", deadline=Deadline.after(0.05))
    # Found absent by one thread, left without by the other; a deadline would come too late.
    training.leave(long())
    del lines


def test_a_rank_that_has_left_is_not_waited_for() -> None:
    job = members(3)
    job[2].leave(long())
    for error in errors_of(round_of(job, [b"", b""], never)):
        assert "never will: it closed its Checkpointer or ended by an error" in str(error)
        assert error.kind == ErrorKind.PEER_ABSENT
        assert error.ranks[2] == "left before"


def test_nobody_waits_for_the_answer_of_a_rank_0_that_has_left() -> None:
    job = members(2)
    job[0].leave(Deadline.after(0.0))
    with pytest.raises(CoordinationError, match="rank 0 did not arrive and never will: it"):
        job[1].round(topic(), b"", never, deadline=long())


def test_what_a_rank_sent_before_it_left_counts() -> None:
    job = members(3)
    with pytest.raises(CoordinationError):  # sent, and then it did not wait for the answer
        job[2].round(topic(), b"c", never, deadline=Deadline.after(0.0))
    job[2].leave(long())
    assert round_of(job, [b"a", b"b"], concat) == [b"a|b|c", b"a|b|c"]


def test_a_rank_whose_connection_breaks_is_named_at_once() -> None:
    hub, *lines = links(4)
    job = [JobCoordinator(link) for link in (hub, *lines[:2])]
    del lines[2]
    # Rank 2 does not come either, but may well be on its way.
    for error in errors_of(round_of(job[:2], [b"", b""], never)):
        assert "rank 3 did not arrive and never will: its connection was lost" in str(error)
        assert (error.kind, error.ranks) == (ErrorKind.PEER_ABSENT, {3: "connection lost"})


def test_what_a_rank_sent_before_it_died_counts() -> None:
    hub, *lines = links(3)
    job = [JobCoordinator(link) for link in (hub, *lines)]
    with pytest.raises(CoordinationError):
        job[2].round(topic(), b"c", never, deadline=Deadline.after(0.0))
    del lines, job[2]
    assert round_of(job, [b"a", b"b"], concat) == [b"a|b|c", b"a|b|c"]


def test_who_comes_back_is_waited_for_again() -> None:
    job = members(2)
    with pytest.raises(CoordinationError):
        job[0].round(topic("first"), b"", lambda _: b"", deadline=Deadline.after(0.05))
    rounds = [
        lambda: job[0].round(topic("second"), b"", lambda _: b"", deadline=long()),
        lambda: job[1].round(topic("second"), b"", lambda _: b"", deadline=long()),
    ]
    assert on_every_rank(rounds) == [b"", b""]
    deadline = Deadline.after(0.05)
    job[0].leave(deadline)
    assert deadline.passed


def test_rank_0_goes_without_those_who_never_leave() -> None:
    members(2)[0].leave(Deadline.after(0.05))


def test_alone_a_round_is_a_call() -> None:
    solo = SoloCoordinator()
    assert solo.round(topic(), b"a", concat, deadline=long()) == b"a"
    assert solo.round(topic(), b"a", lambda m: [b"own"], deadline=long()) == b"own"
    own = StorageError("disk full")
    with pytest.raises(StorageError) as caught:
        solo.round(topic(), own, never, deadline=long())
    assert caught.value is own
    with pytest.raises(OSError, match="x") as foreign:
        solo.round(topic(), OSError("x"), never, deadline=long())
    assert foreign.value.__notes__ == ["the round failed"]


def test_alone_a_foreign_failure_of_the_decision_stays_what_it_is() -> None:
    def decide(messages: Sequence[bytes]) -> bytes:
        raise OSError("from a store that maps nothing")

    with pytest.raises(OSError, match="from a store"):
        SoloCoordinator().round(topic(), b"", decide, deadline=long())


@given(st.floats(0.001, 1e6))
def test_the_coordinator_gives_up_a_tenth_before_the_others(seconds: float) -> None:
    deadline = Deadline.after(seconds)
    early = deadline.for_coordinator()
    assert deadline.at - early.at == pytest.approx(seconds / 10, rel=1e-3, abs=1e-6)
    assert early.span_seconds == deadline.span_seconds == seconds, "messages tell the whole span"
    assert deadline.remaining_seconds <= seconds


def test_a_deadline_passes() -> None:
    past = Deadline(time.monotonic() - 1, 10)
    assert past.passed
    assert past.remaining_seconds == 0
    assert not long().passed


def test_two_coordinators_of_a_rank_share_a_connection() -> None:
    hub, line = links(2)
    pairs = [(JobCoordinator(hub), JobCoordinator(line)) for _ in range(2)]

    def rounds(member: JobCoordinator, name: str) -> Callable[[], bool]:
        def run() -> bool:
            return all(
                member.round(topic(f"{name}{n}"), name.encode(), concat, deadline=long())
                == b"|".join([name.encode()] * 2)
                for n in range(50)
            )

        return run

    works = [
        rounds(member, name)
        for name, pair in zip(("training", "writer"), pairs, strict=True)
        for member in pair
    ]
    assert on_every_rank(works) == [True] * 4


def test_jobs_on_one_connection_do_not_meet() -> None:
    hub, line = links(2)
    for job in range(3):
        both = [JobCoordinator(hub, job), JobCoordinator(line, job)]
        messages = [f"a{job}".encode(), f"b{job}".encode()]
        assert round_of(both, messages, concat) == [f"a{job}|b{job}".encode()] * 2
        both[0].post("note", f"{job}".encode())
        assert heard(both[1], "note") == f"{job}".encode()
        on_every_rank([partial(each.leave, long()) for each in both])
    assert cast(Hub, hub).board.jobs == {}, "what is over is forgotten"


def test_a_note_of_rank_0_is_for_all_and_that_of_another_for_rank_0() -> None:
    job = members(3)
    assert job[1].look("word") is None
    job[0].post("word", b"1")
    job[0].post("word", b"2")
    for member in job[1:]:
        assert heard(member, "word", unlike=b"1") == b"2"
    job[1].post("signal", b"x")
    assert heard(job[0], "signal") == b"x"
    round_of(job, [b""] * 3, concat)
    assert job[2].look("signal") is None


def test_who_connects_late_hears_what_all_were_told() -> None:
    hub, line = links(3)[:2]
    early = [JobCoordinator(hub), JobCoordinator(line)]
    early[0].post("word", b"1")
    errors_of(round_of(early, [b"", StorageError("disk full")], never))
    late = JobCoordinator(line_to(cast(Hub, hub), 2))
    assert heard(late, "word") == b"1"
    with pytest.raises(StorageError, match="disk full"):
        late.round(topic(), b"", never, deadline=long())


def test_a_round_may_be_refused_before_all_have_come() -> None:
    job = members(3)
    job[2].refuse(topic(), CoordinationError("stop", kind=ErrorKind.CANCELLED, ranks={2: "it"}))
    # Also on those that have not come to it: they need not work for it any more.
    verdict = job[1].wait_for(lambda: job[1].verdict(topic()), long())
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == (ErrorKind.CANCELLED, {2: "it"})
    for error in errors_of(round_of(job, [b"", b""], never)):
        assert error.ranks == {2: "it"}


def test_once_all_have_come_a_refusal_is_for_rank_0_to_heed() -> None:
    job = members(2)

    def decide(messages: Sequence[bytes]) -> bytes:
        job[1].refuse(topic(), CoordinationError("stop", ranks={1: "it"}))
        heard = job[0].wait_for(lambda: job[0].verdict(topic()), long())
        assert heard is not None
        assert job[1].verdict(topic()) is None, "nobody else is told: rank 0 may be committing"
        return b"done"

    assert round_of(job, [b"", b""], decide) == [b"done"] * 2
    # It came too late, and of what comes later still nothing is kept.
    job[1].refuse(topic(), CoordinationError("stop", ranks={1: "it"}))
    round_of(job, [b"", b""], concat, key="next")
    assert job[0].verdict(topic()) is None
    assert board_of(job[0]).rounds == {}


def test_what_is_longer_than_a_frame_is_an_error_of_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_module, "MESSAGE_LIMIT_BYTES", 10)
    for error in errors_of(round_of(members(2), [b"", b"x" * 11], never)):
        assert "failed on rank 1: ValueError: 11 bytes are more than the 10" in str(error)
    long_answer, other = round_of(members(2), [b"", b""], lambda _: b"x" * 11)
    assert isinstance(long_answer, ValueError)
    assert isinstance(other, CoordinationError)
    assert list(other.ranks) == [0]


def test_an_interrupt_while_a_rank_waits_breaks_nothing() -> None:
    job = members(2)

    def interrupt() -> None:
        # When its message has come, so that it waits for nothing but the answer.
        board = cast(Hub, job[0].link).board
        while 1 not in board.messages(0, "round"):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        job[1].round(topic(), b"b", never, deadline=long())
    interrupting.join()
    # It said what it had to say, and the next round is as if nothing had been.
    assert job[0].round(topic(), b"a", concat, deadline=long()) == b"a|b"
    assert round_of(job, [b"c", b"d"], concat, key="next") == [b"c|d"] * 2


def test_who_waits_in_another_round_of_the_call_is_not_waited_for() -> None:
    said = [{"node_local": "True"}, {"node_local": "True"}, {"node_local": "False"}]
    names = ["save/1/hosts", "save/1/hosts", "save/1/plan"]
    members = [JobCoordinator(link) for link in links(3)]

    def come(rank: int) -> bytes:
        mine = Topic(names[rank], "the save", opens=True, asked=said[rank])
        return members[rank].round(mine, b"", never, deadline=long())

    failed = errors_of(on_every_rank([partial(come, rank) for rank in range(3)]))
    assert {type(error) for error in failed} == {UsageError}
    for error in failed:
        assert "node_local is True on rank 0 and False on rank 2" in error.message
        assert list(error.ranks) == [2]


def test_a_call_that_is_behind_by_one_is_waited_for() -> None:
    """What a rank left behind, interrupted, tells nothing of the call that comes next."""
    members = [JobCoordinator(link) for link in links(2)]
    with pytest.raises(CoordinationError):
        members[1].round(Topic("save/1/plan", "the save"), b"", never, deadline=Deadline.after(0.0))
    done = on_every_rank(
        [
            lambda: members[0].round(Topic("save/2/plan", "it"), b"0", concat, deadline=long()),
            lambda: members[1].round(Topic("save/2/plan", "it"), b"1", concat, deadline=long()),
        ]
    )
    assert done == [b"0|1", b"0|1"]
