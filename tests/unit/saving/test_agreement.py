"""Agreeing on a plan: described once, then only confirmed, and never half-known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    CoordinationError,
    ErrorKind,
    IncompatibleError,
    UsageError,
)
from dist_ckpt.planning.owners import Owned
from dist_ckpt.planning.owners import decide as decide_owners
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.rounds import Deadline, Decide, Topic
from dist_ckpt.saving.agreement import Agreed, Agreement, Asked, share_objects
from dist_ckpt.saving.messages import RankPlan
from dist_ckpt.saving.snapshot import Snapshot, take_snapshot
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState
from tests.unit.ranks.rounds import links, long, on_every_rank, topic

URL = "memory://run"


class Spy(JobCoordinator):
    """Notes the rounds it takes part in, and loses the answer of some of them."""

    topics: list[str]
    lost: set[str]

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        self.topics.append(topic.key)
        answer = super().round(topic, message, decide, deadline=deadline)
        if topic.key in self.lost:
            raise CoordinationError("the answer came too late", kind=ErrorKind.TIMEOUT)
        return answer


class Ranks:
    """The planners of one job."""

    def __init__(self, world_size: int) -> None:
        self.members = [Spy(link) for link in links(world_size)]
        for member in self.members:
            member.topics, member.lost = [], set()
        # Most tests look at the rounds of planning alone.
        self.planners = [Agreement(member, check_replicas=False) for member in self.members]
        self.begun: list[int] = []

    def snapshots(self, states: Sequence[Mapping[str, Any]]) -> list[Snapshot]:
        return [
            take_snapshot(TrainState(rng=None, **state), world_size=len(self.members))
            for state in states
        ]

    def agree(
        self, step: int, states: Sequence[Mapping[str, Any] | BaseException], **changes: Any
    ) -> list[Agreed | BaseException]:
        def begin(begun: int) -> str:
            self.begun.append(begun)
            return f"c000001-{begun:016x}"

        def work(rank: int) -> Any:
            state = states[rank]
            held = state if isinstance(state, BaseException) else self.snapshots([state])[0]
            steps = changes.get("steps", [step] * len(states))
            return lambda: self.planners[rank].agree(
                Asked(
                    steps[rank],
                    changes.get("urls", [URL] * len(states))[rank],
                    changes.get("options", [{}] * len(states))[rank],
                    changes.get("busy", [False] * len(states))[rank],
                ),
                held,
                changes.get("begin", begin),
                topic=topic(f"save/{step}"),
                deadline=long(),
            )

        return on_every_rank([work(rank) for rank in range(len(states))])

    def owned(self, states: Sequence[Mapping[str, Any]]) -> list[list[Owned]]:
        """What each rank writes of these states, decided anew."""
        return decide_owners([snapshot.held for snapshot in self.snapshots(states)])

    def described(self) -> list[list[str]]:
        return [
            [key for key in member.topics if key.endswith("/describe")] for member in self.members
        ]


def plans(results: Sequence[object]) -> list[RankPlan]:
    found = []
    for result in results:
        assert isinstance(result, Agreed), result
        assert result.plan is not None
        found.append(result.plan)
    return found


def errors_of(results: Sequence[object]) -> list[CheckpointError]:
    found = [result for result in results if isinstance(result, CheckpointError)]
    assert len(found) == len(results), results
    return found


def ddp(rows: int = 4, note: object = 1) -> dict[str, Any]:
    return {"model": {"w": torch.zeros(rows, 3)}, "note": {"n": note}}


def stage(**sizes: int) -> dict[str, Any]:
    """Return a stage of a pipeline: parameters that this rank alone has."""
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    return {"model": torch.nn.ParameterDict(parameters)}


def test_a_second_save_of_one_structure_describes_nothing() -> None:
    job = Ranks(3)
    first = job.agree(1, [ddp()] * 3)
    second = job.agree(2, [ddp(note=2)] * 3)
    assert job.described() == [["save/1/describe"]] * 3
    assert plans(first) == plans(second)
    assert [result.save_id for result in second if isinstance(result, Agreed)] == [
        f"c000001-{2:016x}"
    ] * 3
    assert job.begun == [1, 2]


@pytest.mark.parametrize("drifted", [False, True])
def test_replicas_are_told_one_by_one_only_where_some_differ(drifted: bool) -> None:
    job = Ranks(3)
    job.planners = [Agreement(member) for member in job.members]
    states = [ddp() for _ in range(3)]
    states[2]["model"]["w"][1, 1] += drifted
    result = job.agree(1, states)
    looked = [key.removeprefix("save/1/") for key in job.members[0].topics]
    assert looked == ["plan", "describe", "replicas", *["each replica"] * drifted]
    if not drifted:
        plans(result)
        return
    for error in errors_of(result):
        assert error.kind == ErrorKind.REPLICAS_DIFFER
        assert "w' of part 'model'" in str(error)
        assert sorted(error.ranks) == [0, 2]


@pytest.mark.parametrize(
    "changed",
    [
        ddp(rows=5),
        {"model": {"w": torch.zeros(4, 3), "b": torch.zeros(1)}, "note": {"n": 1}},
        {"model": {"w": torch.zeros(4, 3).half()}, "note": {"n": 1}},
        {"model": {"v": torch.zeros(4, 3)}, "note": {"n": 1}},
        ddp() | {"more": {"x": 1}},
    ],
    ids=["shape", "tensor", "dtype", "name", "part"],
)
def test_another_structure_is_planned_anew_by_all(changed: dict[str, Any]) -> None:
    job = Ranks(2)
    job.agree(1, [ddp()] * 2)
    found = plans(job.agree(2, [changed] * 2))
    assert job.described() == [["save/1/describe", "save/2/describe"]] * 2
    again = plans(job.agree(3, [changed] * 2))
    assert again == found
    assert len(job.described()[0]) == 2
    assert job.owned([changed] * 2) == [plan.owned for plan in again]
    job.agree(4, [ddp()] * 2)
    assert len(job.described()[0]) == 3, "only the newest plan is kept"


def test_a_change_on_one_rank_is_planned_anew_by_all() -> None:
    job = Ranks(2)
    job.agree(1, [stage(a=2), stage(b=3)])
    job.agree(2, [stage(a=2), stage(b=4)])
    assert job.described() == [["save/1/describe", "save/2/describe"]] * 2
    assert job.planners[0].held_by_rank[1][0].shape == (4,)


def test_values_that_come_to_differ_are_named() -> None:
    job = Ranks(3)
    job.agree(1, [ddp(note=5)] * 3)
    results = errors_of(job.agree(2, [ddp(note=6), ddp(note=6), ddp(note=7)]))
    for error in results:
        assert type(error) is IncompatibleError
        assert error.kind == ErrorKind.REPLICAS_DIFFER
        assert "part 'note' differs between rank 0 and rank 2" in str(error)
    found = plans(job.agree(3, [ddp(note=8)] * 3))
    assert [len(plan.objects) for plan in found] == [2, 0, 0]


def test_values_of_one_rank_each_may_differ_and_change() -> None:
    job = Ranks(2)
    for step in (1, 2):
        states = [{"worker": PerRank({"n": step * 10 + rank})} for rank in range(2)]
        assert [plan.objects for plan in plans(job.agree(step, states))] == [[], []]
    assert len(job.described()[0]) == 1


def test_a_rank_that_missed_its_share_never_goes_on_with_an_old_one() -> None:
    job = Ranks(2)
    job.agree(1, [stage(a=40), stage(b=40)])
    # Rank 0 changes and rank 1 does not, but rank 1 does not hear of the new plan.
    changed = [stage(a=50), stage(b=40)]
    job.members[1].lost.add("save/2/describe")
    assert isinstance(job.agree(2, changed)[1], CoordinationError)
    found = plans(job.agree(3, changed))
    assert [keys[-1] for keys in job.described()] == ["save/3/describe"] * 2
    assert job.owned(changed) == [plan.owned for plan in found]


def test_a_rank_that_missed_the_first_plan_is_not_waited_for() -> None:
    job = Ranks(2)
    job.members[1].lost.add("save/1/describe")
    job.agree(1, [ddp()] * 2)
    plans(job.agree(2, [ddp()] * 2))
    assert [keys[-1] for keys in job.described()] == ["save/2/describe"] * 2


def test_a_plan_that_fails_half_way_is_nobodys() -> None:
    job = Ranks(2)
    job.agree(1, [ddp()] * 2)
    bad = [ddp(rows=4), ddp(rows=5)]
    for error in errors_of(job.agree(2, bad)):
        assert type(error) is IncompatibleError
    found = plans(job.agree(3, [ddp()] * 2))
    assert job.described()[0][-1] == "save/3/describe"
    assert job.owned([ddp()] * 2) == [plan.owned for plan in found]


def test_a_rank_that_cannot_say_what_it_holds_fails_all_by_name() -> None:
    job = Ranks(3)
    bad = UsageError("cannot store stats.f", kind=ErrorKind.UNENCODABLE)
    for error in errors_of(job.agree(1, [ddp(), ddp(), bad])):
        assert type(error) is UsageError
        assert error.ranks == {2: "cannot store stats.f"}
    assert job.begun == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": [1, 1, 2]}, "step: rank 0: 1, rank 1: 1, rank 2: 2"),
        ({"urls": ["a", "b", "a"]}, "url: rank 0: a, rank 1: b, rank 2: a"),
    ],
)
def test_ranks_that_were_asked_for_different_things(changes: Any, says: str) -> None:
    job = Ranks(3)
    for error in errors_of(job.agree(1, [ddp()] * 3, **changes)):
        assert type(error) is UsageError
        assert says in str(error)
    assert job.begun == []


def test_ranks_that_save_with_different_options_are_told_which_and_who() -> None:
    job = Ranks(3)
    options = [{"keep": "latest(3)", "staging": "blocking"}] * 3
    options[2] = options[2] | {"keep": "latest(2)"}
    for error in errors_of(job.agree(1, [ddp()] * 3, options=options)):
        assert type(error) is UsageError
        assert "keep is latest(3) on rank 0 and latest(2) on rank 2" in str(error)
        assert sorted(error.ranks) == [0, 2]
    assert job.begun == []


def test_one_busy_rank_is_enough_to_skip_the_save_on_all() -> None:
    job = Ranks(3)
    results = job.agree(1, [ddp()] * 3, busy=[False, True, False])
    assert [result.skipped for result in results if isinstance(result, Agreed)] == [True] * 3
    assert job.begun == []
    assert job.described() == [[]] * 3
    plans(job.agree(2, [ddp()] * 3))


def test_an_attempt_that_cannot_begin_fails_all() -> None:
    def begin(step: int) -> str:
        raise AlreadyExists("step 1 is committed")

    job = Ranks(2)
    for error in errors_of(job.agree(1, [ddp()] * 2, begin=begin)):
        assert type(error) is AlreadyExists
    plans(job.agree(2, [ddp()] * 2))


HELD = st.dictionaries(
    st.sampled_from(["a", "b"]),
    st.dictionaries(st.sampled_from(["", "x", "y"]), st.just("digest")),
)


@given(st.lists(HELD, min_size=1, max_size=5))
def test_every_value_has_one_writer_that_holds_it(by_rank: list[dict[str, dict[str, str]]]) -> None:
    writers, groups = share_objects(by_rank)
    written = [name for names in writers for name in names]
    everything = {(part, name) for one in by_rank for part, names in one.items() for name in names}
    assert sorted(written) == sorted(everything)
    for rank, names in enumerate(writers):
        for part, name in names:
            assert name in by_rank[rank][part]
            assert all(name not in one.get(part, {}) for one in by_rank[:rank]), "the lowest"
    # What several ranks hold is in exactly one group, known to all of them and to nobody else.
    for part, name in everything:
        holders = [rank for rank, one in enumerate(by_rank) if name in one.get(part, {})]
        numbers = [
            {number for number, names in groups[rank].items() if (part, name) in names}
            for rank in range(len(by_rank))
        ]
        expected = numbers[holders[0]] if len(holders) > 1 else set()
        assert len(expected) == (1 if len(holders) > 1 else 0)
        assert numbers == [expected if rank in holders else set() for rank in range(len(by_rank))]


def test_the_plan_is_that_of_the_owners() -> None:
    job = Ranks(2)
    states = [{"model": {"w": torch.zeros(300, 300)}}] * 2
    found = plans(job.agree(1, states))
    held = [snapshot.held for snapshot in job.snapshots(states)]
    assert [plan.owned for plan in found] == decide_owners(held)
