"""What rank 0 decides for a whole job: who writes which box and which value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.planning.columns import HeldByRank, Numbers, Table, pack_steps
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.planning.index import IndexPlan, plan_index
from dist_ckpt.planning.owners import OwnedByRank, share_out
from dist_ckpt.ranks.hosts import Hosts
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.saving.messages import Description, ObjectName, RankPlan
from dist_ckpt.saving.snapshot import Versions, split_versions


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Who writes what, of a whole job.

    Attributes:
        held_by_rank: what each rank holds.
        owned_by_rank: the boxes that each rank writes.
        index: what is known of the index of a save by this plan.
        replicas: for each rank, what it must hold as others do (`Holdings.replicas`).
        replicated: whether any rank has such boxes.
        objects: for each rank, the encoded values that it writes.
        groups: for each rank, the values that must be equal on several ranks.
        versions: for each rank, what it calls values that have another name as they are stored.
        twins: by rank, the one of another host whose boxes it writes, too.
    """

    held_by_rank: HeldByRank
    owned_by_rank: OwnedByRank
    index: IndexPlan
    replicas: Sequence[dict[int, list[int]]]
    replicated: bool
    objects: Sequence[list[ObjectName]]
    groups: Sequence[dict[int, list[ObjectName]]]
    versions: Sequence[Versions]
    twins: Mapping[int, int] = field(default_factory=dict)
    # By the list itself: of ranks alike there is one.
    _packed: dict[int, bytes] = field(default_factory=dict, repr=False)

    def share(self, rank: int, number: int) -> RankPlan:
        """Return what `rank` is told, as plan `number` of the job."""
        writer = self.twins.get(rank, rank)
        return RankPlan(
            number,
            self.owned_by_rank.share(writer),
            self.objects[rank],
            self.groups[rank],
            {group: self._pack(where) for group, where in self.replicas[rank].items()},
            self.replicated,
            {part: dict(named) for part, named in self.versions[rank].items()},
            self.index.tensors[writer],
            self.twins.get(rank),
        )

    def _pack(self, positions: list[int]) -> bytes:
        if (packed := self._packed.get(id(positions))) is None:
            packed = self._packed[id(positions)] = pack_steps(positions)
        return packed


def plan_job(
    messages: Sequence[bytes],
    *,
    max_piece_bytes: int | None = None,
    hosts: Hosts | None = None,
) -> JobPlan:
    """Decide who writes what.

    Args:
        messages: the description of each rank (`Description`).
        max_piece_bytes: a larger box is cut; None for no limit.
        hosts: where each of them has a folder of its own, so that a box is written on every host
            that has it; None where all ranks share one place.

    Raises:
        IncompatibleError: ranks hold what cannot be one state; names what and who.
    """
    descriptions = [unpack(data, Description) for data in messages]
    objects, versions = split_versions(descriptions)
    common = {part for each in descriptions for part in each.versioned}
    writers, groups = share_objects(objects, common=common)
    twins = {} if hosts is None else _find_twins(descriptions, hosts)
    held = put_together(descriptions, twins)
    holdings = Holdings.of(held)
    owned = share_out(held, holdings, max_piece_bytes=max_piece_bytes)
    index, replicas = plan_index(held, owned, holdings), holdings.replicas()
    return JobPlan(held, owned, index, replicas, any(replicas), writers, groups, versions, twins)


def _find_twins(descriptions: Sequence[Description], hosts: Hosts) -> dict[int, int]:
    """Find the hosts whose ranks hold, one by one, what those of an earlier host hold.

    Returns:
        By rank of such a host, the rank of the other that holds the same boxes.
    """
    first: dict[tuple[tuple[str, bytes], ...], list[int]] = {}
    twins: dict[int, int] = {}
    for host in range(len(hosts.names)):
        ranks = hosts.ranks(host)
        held = tuple((descriptions[rank].digest, descriptions[rank].numbers) for rank in ranks)
        others = first.setdefault(held, ranks)
        if others is not ranks:
            twins |= zip(ranks, others, strict=True)
    return twins


def put_together(descriptions: Sequence[Description], twins: Collection[int] = ()) -> HeldByRank:
    """Return what all ranks but `twins` hold, given that each table was sent by one rank."""
    tables = {each.digest: Table.decode(each.table) for each in descriptions if each.table}
    nothing = Table(())
    of_ranks = [
        nothing if rank in twins else tables[each.digest] for rank, each in enumerate(descriptions)
    ]

    def numbers(rank: int) -> Numbers:
        if rank in twins:
            return np.zeros(0, np.int64)
        return of_ranks[rank].unpack(descriptions[rank].numbers)

    return HeldByRank.joined(of_ranks, numbers)


def share_objects(
    objects_by_rank: Sequence[dict[str, dict[str, str]]],
    *,
    common: Collection[str] = (),
) -> tuple[list[list[ObjectName]], list[dict[int, list[ObjectName]]]]:
    """Decide which rank writes each encoded value, and which values must stay equal over ranks.

    Args:
        objects_by_rank: for each rank the digest of each value it holds, by part and name.
        common: parts that cannot be each rank's own.

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
        digests = [objects_by_rank[rank][part][name] for rank in ranks]
        _check_equal(part, name, ranks, digests, way_out=part not in common)
        writers[ranks[0]].append((part, name))
        if len(ranks) > 1:
            number = numbers.setdefault(tuple(ranks), len(numbers))
            for rank in ranks:
                groups[rank].setdefault(number, []).append((part, name))
    return writers, groups


def _check_equal(
    part: str, name: str, ranks: Sequence[int], digests: Sequence[str], *, way_out: bool
) -> None:
    for rank, digest in zip(ranks, digests, strict=True):
        if digest != digests[0]:
            value = f"value {name!r} of part {part!r}" if name else f"part {part!r}"
            raise IncompatibleError(
                f"{value} differs between rank {ranks[0]} and rank {rank}: make it equal on all "
                f"ranks{', or wrap the part in PerRank(...) to keep one for each' * way_out}",
                kind=ErrorKind.REPLICAS_DIFFER,
            )
