"""What rank 0 decides for a whole job: who writes which box and which value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.planning.columns import HeldByRank, Table, unpack_numbers
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.planning.index import IndexPlan, plan_index
from dist_ckpt.planning.owners import OwnedByRank, share_out
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
    """

    held_by_rank: HeldByRank
    owned_by_rank: OwnedByRank
    index: IndexPlan
    replicas: Sequence[dict[int, list[int]]]
    replicated: bool
    objects: Sequence[list[ObjectName]]
    groups: Sequence[dict[int, list[ObjectName]]]
    versions: Sequence[Versions]

    def share(self, rank: int, number: int) -> RankPlan:
        """Return what `rank` is told, as plan `number` of the job."""
        return RankPlan(
            number,
            self.owned_by_rank.share(rank),
            self.objects[rank],
            self.groups[rank],
            self.replicas[rank],
            self.replicated,
            {part: dict(named) for part, named in self.versions[rank].items()},
            self.index.tensors[rank],
        )


def plan_job(messages: Sequence[bytes], *, max_piece_bytes: int | None = None) -> JobPlan:
    """Decide who writes what.

    Args:
        messages: the description of each rank (`Description`).
        max_piece_bytes: a larger box is cut; None for no limit.

    Raises:
        IncompatibleError: ranks hold what cannot be one state; names what and who.
    """
    descriptions = [unpack(data, Description) for data in messages]
    objects, versions = split_versions(descriptions)
    common = {part for each in descriptions for part in each.versioned}
    writers, groups = share_objects(objects, common=common)
    held = _put_together(descriptions)
    holdings = Holdings.of(held)
    owned = share_out(held, holdings, max_piece_bytes=max_piece_bytes)
    index, replicas = plan_index(held, owned, holdings.ties), holdings.replicas()
    return JobPlan(held, owned, index, replicas, any(replicas), writers, groups, versions)


def _put_together(descriptions: Sequence[Description]) -> HeldByRank:
    """Return what all ranks hold, given that each table was sent by one of them."""
    tables = {each.digest: Table.decode(each.table) for each in descriptions if each.table}
    by_rank = []
    for each in descriptions:
        table = tables[each.digest]
        by_rank.append((table, unpack_numbers(each.numbers, count=table.columns[-1])))
    return HeldByRank.joined(by_rank)


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
