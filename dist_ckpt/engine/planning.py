"""Agreeing on who writes what, once; later saves of the same structure only confirm it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_ckpt.dcp.owners import Owned, decide
from dist_ckpt.dcp.planner import Held
from dist_ckpt.engine.coordinator import Coordinator, Deadline, Topic
from dist_ckpt.engine.messages import (
    Description,
    ObjectName,
    PlanAnswer,
    PlanRequest,
    RankPlan,
    check_same,
    pack,
    unpack,
)
from dist_ckpt.engine.snapshot import Snapshot
from dist_ckpt.errors import ErrorKind, IncompatibleError

BeginAttempt = Callable[[int], str]
"""Rank 0: open an attempt to save a step and return its save_id."""


class Planner:
    """Keeps the plan of one job between saves, while the structure of the state stays the same."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._own: tuple[str, RankPlan] | None = None
        # Rank 0 only: the number of its newest plan, and what that was made of.
        self._number = 0
        self.held_by_rank: list[list[Held]] = []
        self.owned_by_rank: list[list[Owned]] = []

    def agree(
        self,
        step: int,
        url: str,
        snapshot: Snapshot | BaseException,
        begin: BeginAttempt,
        *,
        topic: Topic,
        deadline: Deadline,
    ) -> tuple[str, RankPlan]:
        """Return the save_id of the attempt and this rank's share of the plan.

        Args:
            step: what is to be saved.
            url: where to; ranks that were asked for different things are told so.
            snapshot: what this rank holds, or the error that kept it from saying so.
            begin: called on rank 0 only.
            topic: names the save.
            deadline: when to give up.

        Raises:
            CheckpointError: the same on every rank.
        """
        message: bytes | BaseException
        if isinstance(snapshot, BaseException):
            message = snapshot
        else:
            message = pack(self._request(step, url, snapshot))
        data = self._coordinator.round(
            topic.phase("plan"),
            message,
            lambda all_: self._answer(all_, begin),
            deadline=deadline,
        )
        answer = unpack(data, PlanAnswer)
        if isinstance(snapshot, BaseException):  # the round raised it on every rank
            raise snapshot
        if answer.plan_holds and self._own is not None:
            return answer.save_id, self._own[1]
        # Forgotten before the new one is there: a rank that misses its answer must not write by a
        # plan that the others have left.
        self._own = None
        data = self._coordinator.round(
            topic.phase("describe"), pack(snapshot.description()), self._plan, deadline=deadline
        )
        plan = unpack(data, RankPlan)
        self._own = (snapshot.fingerprint, plan)
        return answer.save_id, plan

    def _request(self, step: int, url: str, snapshot: Snapshot) -> PlanRequest:
        if self._own is None or self._own[0] != snapshot.fingerprint:
            return PlanRequest(step, url, None, {})
        plan = self._own[1]
        digests = {number: snapshot.group_digest(names) for number, names in plan.groups.items()}
        return PlanRequest(step, url, plan.number, digests)

    def _answer(self, messages: Sequence[bytes], begin: BeginAttempt) -> bytes:
        requests = [unpack(data, PlanRequest) for data in messages]
        check_same(requests, "save")
        # Every rank has to have this very plan: one that missed its share asks for a new one.
        holds = all(request.plan == self._number for request in requests)
        holds = holds and _groups_agree(requests)
        return pack(PlanAnswer(begin(requests[0].step), holds))

    def _plan(self, messages: Sequence[bytes]) -> list[bytes]:
        # First of all: should planning fail half-way, no rank has a plan of this number.
        self._number += 1
        descriptions = [unpack(data, Description) for data in messages]
        writers, groups = share_objects([each.objects for each in descriptions])
        # Replaced, never changed: the commit of a save that was given up may still read the old.
        self.held_by_rank = [each.held for each in descriptions]
        self.owned_by_rank = decide(self.held_by_rank)
        return [
            pack(RankPlan(self._number, owned, writers[rank], groups[rank]))
            for rank, owned in enumerate(self.owned_by_rank)
        ]


def share_objects(
    objects_by_rank: Sequence[dict[str, dict[str, str]]],
) -> tuple[list[list[ObjectName]], list[dict[int, list[ObjectName]]]]:
    """Decide which rank writes each encoded value, and which values must stay equal over ranks.

    Args:
        objects_by_rank: for each rank the digest of each value it holds, by part and name.

    Returns:
        For each rank the values it writes (the lowest holder writes), and for each rank its groups:
        the values held by one and the same set of several ranks.

    Raises:
        IncompatibleError: a value differs between ranks; the message names it and two ranks.
    """
    holders: dict[ObjectName, list[int]] = {}
    for rank, parts in enumerate(objects_by_rank):
        for part, objects in parts.items():
            for name in objects:
                holders.setdefault((part, name), []).append(rank)
    writers: list[list[ObjectName]] = [[] for _ in objects_by_rank]
    groups: list[dict[int, list[ObjectName]]] = [{} for _ in objects_by_rank]
    numbers: dict[tuple[int, ...], int] = {}
    for (part, name), ranks in holders.items():
        _check_equal(part, name, ranks, [objects_by_rank[rank][part][name] for rank in ranks])
        writers[ranks[0]].append((part, name))
        if len(ranks) > 1:
            number = numbers.setdefault(tuple(ranks), len(numbers))
            for rank in ranks:
                groups[rank].setdefault(number, []).append((part, name))
    return writers, groups


def _check_equal(part: str, name: str, ranks: Sequence[int], digests: Sequence[str]) -> None:
    for rank, digest in zip(ranks, digests, strict=True):
        if digest != digests[0]:
            value = f"value {name!r} of part {part!r}" if name else f"part {part!r}"
            raise IncompatibleError(
                f"{value} differs between rank {ranks[0]} and rank {rank}: make it equal on all "
                "ranks, or wrap the part in PerRank(...) to keep one for each rank",
                kind=ErrorKind.REPLICAS_DIFFER,
            )


def _groups_agree(requests: Sequence[PlanRequest]) -> bool:
    seen: dict[int, str] = {}
    return all(
        seen.setdefault(number, digest) == digest
        for request in requests
        for number, digest in request.shared.items()
    )
