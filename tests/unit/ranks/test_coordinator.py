"""Rounds: one decision for all, the first error ends them, and the absent are named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    FencedError,
    IntegrityError,
    StorageError,
)
from dist_ckpt.ranks.coordinator import StoreCoordinator
from dist_ckpt.ranks.rounds import Deadline, Decide, SoloCoordinator
from tests.unit.ranks.rounds import hash_store, long, members, on_every_rank, topic


def concat(messages: Sequence[bytes]) -> bytes:
    return b"|".join(messages)


def never(messages: Sequence[bytes]) -> bytes:
    raise AssertionError("must not be asked")


def round_of(
    job: Sequence[StoreCoordinator],
    messages: Sequence[bytes | BaseException],
    decide: Decide,
    *,
    key: str = "round",
    deadline: Callable[[], Deadline] = long,
) -> list[bytes | BaseException]:
    """Let the first `len(messages)` members take part in one round."""

    def work(rank: int) -> Callable[[], bytes]:
        return lambda: job[rank].round(topic(key), messages[rank], decide, deadline=deadline())

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


def test_an_answer_for_all_is_stored_once() -> None:
    store = hash_store()
    job = members(4, store)
    before = store.num_keys()
    round_of(job, [b""] * 4, lambda _: b"x" * 100)
    assert store.check(["round/answer/all"])
    assert store.num_keys() - before <= 6, "the count does not depend on the ranks"


def test_messages_and_answers_above_8_mib_pass_a_tcp_store() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60))
    job = [StoreCoordinator(server, 0, 2), StoreCoordinator(client, 1, 2)]
    large = bytes(range(256)) * ((9 << 20) // 256) + b"end"
    assert round_of(job, [b"small", large], concat) == [b"small|" + large] * 2


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
    results = errors_of(round_of(job, [b"", b""], never, deadline=soon))
    for error in results:
        assert (error.kind, error.ranks) == (
            ErrorKind.PEER_ABSENT,
            {2: "did not arrive", 3: "did not arrive"},
        )
        assert "rank 2, 3 did not arrive within 0.3 s" in str(error)
    # Who comes late is told at once, whatever its own deadline.
    with pytest.raises(CoordinationError, match="rank 2, 3 did not arrive"):
        job[3].round(topic(), b"late", never, deadline=long())


def test_who_died_between_number_and_message_does_not_hide_the_others() -> None:
    store = hash_store()
    store.add("round/arrived", 1)  # all that rank 2 of 3 did
    for error in errors_of(round_of(members(3, store), [b"", b""], never, deadline=soon)):
        assert error.ranks == {2: "did not arrive"}


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


def test_keys_of_old_rounds_are_forgotten() -> None:
    store = hash_store()
    job = members(3, store)
    counts = []
    for number in range(20):
        each: Decide = lambda messages: list(messages)  # noqa: E731
        round_of(job, [b"x"] * 3, concat if number % 2 else each, key=f"round-{number}")
        counts.append(store.num_keys())
    assert max(counts[4:]) == max(counts[:4])
    assert not store.check(["round-0/arrived"])
    assert not store.check(["round-17/decided"])


def test_failed_rounds_leave_their_error_and_no_messages() -> None:
    store = hash_store()
    job = members(2, store)
    for number in range(5):
        round_of(job, [b"x" * 1000, StorageError("no")], never, key=f"round-{number}")
    for number in range(5):
        assert store.check([f"round-{number}/error"])
        # The first to arrive may be the failing rank, which leaves the other one's message.
        left = [n for n in (1, 2) if store.check([f"round-{number}/message/{n}"])]
        assert len(left) <= 1


class Broken:
    """A store whose server is gone."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: object) -> None:
            raise dist.DistNetworkError("connection reset by peer")

        return fail


def test_a_lost_connection_is_the_loss_of_rank_0() -> None:
    store: Any = Broken()
    member = StoreCoordinator(store, 1, 2)
    with pytest.raises(CoordinationError, match="connection to rank 0 was lost") as caught:
        member.round(topic(), b"", never, deadline=long())
    assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.PEER_ABSENT, [0])
    verdict = member.verdict(topic())
    assert verdict is not None
    assert verdict.kind == ErrorKind.PEER_ABSENT
    member.leave(long())  # there is nobody to tell, which is no error


def test_rank_0_leaves_last() -> None:
    store = hash_store()
    job = members(3, store)
    left: list[int] = []

    def leave(rank: int) -> None:
        job[rank].leave(long())
        left.append(rank)

    first = threading.Thread(target=leave, args=(0,))
    first.start()
    while not store.check(["left/0"]):
        pass
    leave(1)
    assert first.is_alive()
    leave(2)
    first.join()
    assert sorted(left) == [0, 1, 2]


def test_rank_0_does_not_wait_for_those_it_named_absent() -> None:
    absent: set[int] = set()
    store = hash_store()
    training, writer = (StoreCoordinator(store, 0, 3, absent=absent) for _ in range(2))
    StoreCoordinator(store, 1, 3).leave(long())
    with pytest.raises(CoordinationError, match="rank 1, 2 did not arrive"):
        writer.round(topic(), b"", lambda _: b"", deadline=Deadline.after(0.05))
    # Found absent by one thread, left without by the other; a deadline would come too late.
    training.leave(long())
    assert absent == {1, 2}


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
    with pytest.raises(CoordinationError, match="rank 0 did not arrive and rank 0 never will"):
        job[1].round(topic(), b"", never, deadline=long())


def test_what_a_rank_sent_before_it_left_counts() -> None:
    job = members(3)
    with pytest.raises(CoordinationError):  # sent, and then it did not wait for the answer
        job[2].round(topic(), b"c", never, deadline=Deadline.after(0.0))
    job[2].leave(long())
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


def test_two_coordinators_of_a_rank_share_a_client() -> None:
    server: Store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = [members(1, server)[0], members(1, server)[0]]

    def rounds(member: StoreCoordinator, name: str) -> Callable[[], bool]:
        def run() -> bool:
            return all(
                member.round(topic(f"{name}{n}"), name.encode(), concat, deadline=long())
                == name.encode()
                for n in range(50)
            )

        return run

    assert on_every_rank([rounds(job[0], "training"), rounds(job[1], "writer")]) == [True, True]
