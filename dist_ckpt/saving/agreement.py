"""Agreeing on who writes what, once; later saves of the same structure only confirm it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from msgspec import structs

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    from_wire,
    may_pass,
    to_wire,
)
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.index import Held
from dist_ckpt.planning.columns import HeldByRank, Numbers, Table, pack_runs, unpack_runs
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.planning.files import IndexPlan, plan_index
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.planning.owners import OwnedByRank, read_owned, share_out
from dist_ckpt.ranks.hosts import Hosts
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic, check_same, pack, unpack
from dist_ckpt.saving.messages import (
    Description,
    ObjectName,
    PlanAnswer,
    PlanRequest,
    RankPlan,
    ReplicaDigests,
    ReplicaSums,
)
from dist_ckpt.saving.snapshot import Snapshot, Versions, split_versions
from dist_ckpt.staging.checksum import bytes_of, checksum

_log = logging.getLogger("dist_ckpt")

_EACH = b"each"  # is to be told by itself, as the sums of some ranks differ

BeginAttempt = Callable[[int], str]
"""Rank 0: open an attempt to save a step and return its save_id."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What this rank was asked to save; ranks that were asked for different things are told so.

    Attributes:
        step: which step.
        url: where to.
        options: how, by the name of the option, as text that is equal wherever the option is.
        busy: whether to rather skip the save, because one is in flight here.
        earlier: how a save before this one failed, if nobody was told of that here.
    """

    step: int
    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    busy: bool = False
    earlier: Exception | None = None


def as_asked(option: object) -> str:
    """Return an option of `Asked` as text: without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(option))


@dataclass(frozen=True, slots=True)
class _Own:
    """This rank's share of the newest plan, and what that was made for."""

    fingerprint: str
    table: str
    plan: RankPlan


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks agreed on.

    Attributes:
        save_id: the attempt; empty when the save is skipped.
        plan: what this rank writes; None when the save is skipped.
        earlier: the failure of a save before this one that all ranks tell now, or, when this one
            is skipped, that this rank still has to tell.
        told: the same, but equal on all ranks: of several failures the one that weighs the most.
    """

    save_id: str
    plan: RankPlan | None
    earlier: Exception | None = None
    told: CheckpointError | None = None

    @property
    def skipped(self) -> bool:
        """Whether nothing is saved, on any rank, because some rank was busy."""
        return self.plan is None


class Agreement:
    """Keeps the plan of one job between saves, while the structure of the state stays the same."""

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        max_piece_bytes: int | None = None,
        check_replicas: bool | None = None,
    ) -> None:
        """Begin without a plan.

        Args:
            coordinator: the way to the other ranks.
            max_piece_bytes: a larger box is cut; None for no limit. The same on all ranks.
            check_replicas: whether what several ranks hold is compared before it is staged: at
                every save, never, or (None) once for each plan and by samples after that. The same
                on all ranks.
        """
        self._coordinator = coordinator
        self._max_piece_bytes = max_piece_bytes
        self._check_replicas = check_replicas
        self._own: _Own | None = None
        # The number of the plan whose replicas were found equal.
        self._checked = 0
        self._turn = 0
        # Rank 0 only: the number of its newest plan, and what that was made of.
        self.number = 0
        self.held_by_rank: Sequence[list[Held]] = []
        self.index = IndexPlan(b"", ())
        self.parts: Sequence[str] = ()
        self._replicas: Sequence[dict[int, list[int]]] = []
        # Set by whoever knows them, where each has a folder of its own.
        self.hosts: Hosts | None = None

    def agree(
        self,
        asked: Asked,
        snapshot: Snapshot | BaseException,
        begin: BeginAttempt,
        *,
        topic: Topic,
        deadline: Deadline,
    ) -> Agreed:
        """Return the attempt and this rank's share of the plan.

        Args:
            asked: what is to be saved.
            snapshot: what this rank holds, or the error that kept it from saying so.
            begin: called on rank 0 only.
            topic: names the save.
            deadline: when to give up.

        Raises:
            CheckpointError: the same on every rank.
        """
        message: bytes | BaseException
        try:
            # Raised in the round, where the other ranks wait for this one.
            message = (
                snapshot if isinstance(snapshot, BaseException) else self._ask(asked, snapshot)
            )
        except BaseException as error:
            message = error
        data = self._coordinator.round(
            topic.opening("plan"),
            message,
            lambda all_: self.answer(all_, begin),
            deadline=deadline,
        )
        answer = unpack(data, PlanAnswer)
        if isinstance(snapshot, BaseException):  # the round raised it on every rank
            raise snapshot
        self._turn = answer.turn
        if answer.skip:
            return Agreed("", None, asked.earlier)
        own = self._own
        if own is None or not answer.plan_holds:
            own = self._plan_anew(snapshot, topic, deadline, send_table=answer.table)
        plan = own.plan
        if plan.replicated and (answer.suspicious or self._is_check_due(plan)):
            self._compare(snapshot, plan, topic, deadline)
            # Only now: ranks that differ are told so at every save until they are made equal.
            self._checked = plan.number
        told = from_wire(answer.earlier) if answer.earlier else None
        return Agreed(answer.save_id, plan, asked.earlier or told, told)

    def _ask(self, asked: Asked, snapshot: Snapshot) -> bytes:
        number, digests, samples = None, {}, {}
        if self._own is not None and self._own.fingerprint == snapshot.fingerprint:
            plan, table = self._own.plan, self._own.table
            number = plan.number
            digests = {
                group: snapshot.group_digest(names, plan.versions)
                for group, names in plan.groups.items()
            }
            if self._check_replicas is None and not asked.busy:
                samples = {
                    group: digest_sample([snapshot.local[at] for at in positions], self._turn)
                    for group, positions in plan.replicas.items()
                }
        else:
            table = bytes_digest(snapshot.table().encode())
        return pack(
            PlanRequest(
                asked.step,
                asked.url,
                number,
                table,
                digests,
                samples,
                dict(asked.options),
                asked.busy,
                {} if asked.earlier is None else to_wire(asked.earlier),
            )
        )

    def answer(self, messages: Sequence[bytes], begin: BeginAttempt) -> bytes | list[bytes]:
        """Return what the ranks are answered: one answer for all, or one for each.

        Args:
            messages: what they asked, by rank.
            begin: opens the attempt.

        Raises:
            UsageError: they do not ask for the same save.
        """
        requests = [unpack(data, PlanRequest) for data in messages]
        check_same(requests, "save")
        # Told to all, since a rank that once missed an answer would take other samples for ever.
        turn = self._turn + 1
        # All or none: a rank that skipped alone would leave the others waiting in this save.
        if any(request.busy for request in requests):
            return pack(PlanAnswer("", plan_holds=False, skip=True, turn=turn))
        # Every rank has to have this very plan: one that missed its share asks for a new one.
        holds = all(request.plan == self.number for request in requests)
        # Where they differ all is described anew, and the value that differs is named.
        holds = holds and _groups_agree(requests)
        suspicious = holds and samples_differ(request.replicas for request in requests)
        # Told by all ranks if one of them has it to tell, so that all of them take the same way.
        failures = [request.earlier for request in requests if request.earlier]
        grave = [each for each in failures if not may_pass(from_wire(each))]
        earlier = next(iter(grave or failures), {})
        save_id = begin(requests[0].step)
        answer = PlanAnswer(save_id, holds, turn=turn, suspicious=suspicious, earlier=earlier)
        if holds:
            return pack(answer)
        first: dict[str, int] = {}
        for rank, request in enumerate(requests):
            first.setdefault(request.table, rank)
        telling = set(first.values())
        one, other = pack(structs.replace(answer, table=True)), pack(answer)
        return [one if rank in telling else other for rank in range(len(requests))]

    def _plan_anew(
        self, snapshot: Snapshot, topic: Topic, deadline: Deadline, *, send_table: bool
    ) -> _Own:
        # Forgotten before the new one is there: a rank that misses its answer must not write by a
        # plan that the others have left.
        self._own = None
        table = snapshot.table()
        encoded = table.encode()
        digest = bytes_digest(encoded)
        message = pack(snapshot.description(table, digest, encoded if send_table else b""))
        data = self._coordinator.round(
            topic.phase("describe"), message, self._plan, deadline=deadline
        )
        plan = unpack(data, RankPlan)
        owned = read_owned(plan.share, snapshot.held)
        if plan.twin_of is not None:
            # What may differ there is sent by the one whose values count.
            owned = [box for box in owned if not snapshot.held[box.held].unequal]
        most = len(snapshot.held)
        plan = structs.replace(
            plan,
            owned=owned,
            numbers=unpack_runs(plan.tensors, most=most),
            replicas={group: unpack_runs(at, most=most) for group, at in plan.alike.items()},
        )
        self._own = _Own(snapshot.fingerprint, digest, plan)
        return self._own

    def _plan(self, messages: Sequence[bytes]) -> list[bytes]:
        # First of all: should planning fail half-way, no rank has a plan of this number.
        self.number += 1
        plan = plan_job(messages, max_piece_bytes=self._max_piece_bytes, hosts=self.hosts)
        # Replaced, never changed: the commit of a save that was given up may still read the old.
        self.held_by_rank, self.index, self.parts = plan.held_by_rank, plan.index, plan.parts
        self._replicas = plan.replicas
        return [pack(plan.share(rank, self.number)) for rank in range(len(messages))]

    def _is_check_due(self, plan: RankPlan) -> bool:
        if self._check_replicas is None:
            return self._checked != plan.number
        return self._check_replicas

    def _compare(
        self, snapshot: Snapshot, plan: RankPlan, topic: Topic, deadline: Deadline
    ) -> None:
        message: bytes | BaseException
        each = b""
        try:
            found = digest_replicas([snapshot.local[at] for at in _flat(plan.replicas)])
            each, message = pack(found), pack(_summed(found, plan.replicas))
        except BaseException as error:  # a device that failed: the others wait in the round
            message = error
        answer = self._coordinator.round(
            topic.phase("replicas"),
            message,
            lambda all_: _EACH if _sums_differ(all_) else b"",
            deadline=deadline,
        )
        if answer != _EACH:
            return
        self._coordinator.round(
            topic.phase("each replica"),
            each,
            lambda all_: compare_replicas(
                self.held_by_rank, [_flat(groups) for groups in self._replicas], all_
            ),
            deadline=deadline,
        )


def _flat(groups: Mapping[int, Sequence[int]]) -> list[int]:
    return [position for positions in groups.values() for position in positions]


def _groups_agree(requests: Sequence[PlanRequest]) -> bool:
    seen: dict[int, str] = {}
    return all(
        seen.setdefault(number, digest) == digest
        for request in requests
        for number, digest in request.shared.items()
    )


def _summed(found: ReplicaDigests, groups: Mapping[int, Sequence[int]]) -> ReplicaSums:
    """Put the digests of all boxes of a group into one; how they were made changes it, too."""
    sums: dict[int, bytes] = {}
    first = 0
    for group, positions in groups.items():
        last = first + len(positions)
        digests = found.digests[first * DIGEST_BYTES : last * DIGEST_BYTES]
        sums[group] = xxhash.xxh3_128_digest(found.methods[first:last] + digests)
        first = last
    return ReplicaSums(sums)


def _sums_differ(messages: Sequence[bytes]) -> bool:
    seen: dict[int, bytes] = {}
    return any(
        seen.setdefault(group, value) != value
        for data in messages
        for group, value in unpack(data, ReplicaSums).groups.items()
    )


# What rank 0 decides for a whole job: who writes which box and which value.


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
        parts: the names of the parts of all ranks: one of them may have a part alone.
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
    parts: Sequence[str] = ()
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
            packed = self._packed[id(positions)] = pack_runs(positions)
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
    named = [[*each.objects, *each.per_rank] for each in descriptions]
    return JobPlan(
        held,
        owned,
        index,
        replicas,
        any(replicas),
        writers,
        groups,
        versions,
        twins,
        parts=list(dict.fromkeys(part for names in named for part in names)),
    )


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


# Are replicas equal? Ranks compare digests of what they hold alike.
#
# The first difference is named: rows of replicas that drifted apart would be a checkpoint of a
# state that no rank ever had. All is compared when a plan is new, by one digest for each group of
# ranks; only where these differ is each box told by itself. Later saves compare a sample,
# another one each time, within the messages that they exchange anyway; all again where samples
# differ.


DIGEST_BYTES = 8
# How the digest of a box was made. Digests are comparable where both letters are equal.
_ON_HOST, _ON_DEVICE = b"h", b"d"


def digest_replicas(boxes: Sequence[LocalBox]) -> ReplicaDigests:
    """Digest the memory of each of `boxes`, without copying a device's memory to the host."""
    methods: list[bytes] = []
    sums: list[torch.Tensor] = []
    host: dict[int, bytes] = {}
    for number, box in enumerate(boxes):
        if box.memory.device.type == "cpu":
            host[number] = _host_digest(box.memory)
            methods.append(_ON_HOST)
        else:
            sums.append(checksum(box.memory))
            methods.append(_ON_DEVICE)
    # Fetched together: one wait for the device, not one for each box.
    fetched = iter(_fetch(sums))
    parts = [host[number] if number in host else next(fetched) for number in range(len(boxes))]
    return ReplicaDigests(b"".join(methods), b"".join(parts))


SAMPLES = 32
"""In so many saves everything is compared: what the last of them costs, each of them costs.

A digest reads 29 GiB/s where the copy of a share writes 14 (two cores, x86-64): with four replicas
of everything a sample takes 6 % of the time that the copies take.
"""


def digest_sample(boxes: Sequence[LocalBox], turn: int) -> bytes:
    """Digest one of `SAMPLES` stretches of the memory of all `boxes` laid end to end.

    Args:
        boxes: what is held alike on other ranks, in the same order there.
        turn: which stretch; they come round.

    Returns:
        A letter that says how it was made, and the digest; comparable where the letters are equal.
    """
    hasher = xxhash.xxh3_64()
    sums: list[torch.Tensor] = []
    methods: set[bytes] = set()
    for memory, start, stop in _stretch([box.memory for box in boxes], turn % SAMPLES):
        part = bytes_of(memory)[start:stop]
        if part.device.type == "cpu":
            methods.add(_ON_HOST)
            hasher.update(part.numpy().data)
        else:
            methods.add(_ON_DEVICE)
            sums.append(checksum(part))
    for value in _fetch(sums):
        hasher.update(value)
    return b"".join(sorted(methods)) + hasher.digest()


def samples_differ(samples_by_rank: Iterable[Mapping[int, bytes]]) -> bool:
    """Tell whether two ranks of a group have comparable digests that are not equal."""
    seen: dict[tuple[int, bytes], bytes] = {}
    return any(
        seen.setdefault((group, digest[:-DIGEST_BYTES]), digest) != digest
        for samples in samples_by_rank
        for group, digest in samples.items()
    )


def _stretch(
    memories: Sequence[torch.Tensor], number: int
) -> Iterable[tuple[torch.Tensor, int, int]]:
    """Return which bytes of which memory belong to the stretch `number`."""
    total = sum(memory.nbytes for memory in memories)
    low, high = total * number // SAMPLES, total * (number + 1) // SAMPLES
    begin = 0
    for memory in memories:
        start, stop = max(low - begin, 0), min(high - begin, memory.nbytes)
        if start < stop:
            yield memory, start, stop
        begin += memory.nbytes


def compare_replicas(
    held_by_rank: Sequence[Sequence[Held]],
    replicas_by_rank: Sequence[Sequence[int]],
    messages: Sequence[bytes],
) -> bytes:
    """Rank 0: compare the digests of every box over the ranks that hold it; the answer is empty.

    Raises:
        IncompatibleError: a box differs; the message names the tensor and two ranks.
    """
    first: dict[tuple[object, ...], tuple[int, bytes, bytes]] = {}
    incomparable: dict[str, tuple[int, int]] = {}
    for rank, data in enumerate(messages):
        found = unpack(data, ReplicaDigests)
        mine = held_by_rank[rank]  # once: it may be made of columns anew each time
        for number, position in enumerate(replicas_by_rank[rank]):
            held = mine[position]
            method = found.methods[number : number + 1]
            value = found.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            where = (held.part, held.name, held.offsets, held.sizes)
            other, its_method, its_value = first.setdefault(where, (rank, method, value))
            if method != its_method:
                incomparable.setdefault(f"{held.part}/{held.name}", (other, rank))
            elif value != its_value:
                raise _differ(held, other, rank)
    _warn(incomparable)
    return b""


def _host_digest(memory: torch.Tensor) -> bytes:
    # Zero-copy where the tensor is contiguous, as nearly all are.
    return xxhash.xxh3_64_digest(bytes_of(memory).numpy().data)


def _fetch(sums: Sequence[torch.Tensor]) -> list[bytes]:
    by_device: dict[torch.device, list[int]] = {}
    for number, one in enumerate(sums):
        by_device.setdefault(one.device, []).append(number)
    out = [b""] * len(sums)
    for numbers in by_device.values():
        values = torch.stack([sums[number] for number in numbers]).cpu().numpy()
        for number, value in zip(numbers, values.astype(np.int64), strict=True):
            out[number] = value.tobytes()
    return out


def _differ(held: Held, rank: int, other: int) -> IncompatibleError:
    where = "" if held.sizes == held.shape else f" (its box at {list(held.offsets)})"
    return IncompatibleError(
        f"tensor {held.name!r} of part {held.part!r}{where} has other values on rank {rank} than "
        f"on rank {other}, which hold it as copies of one another: find out why they drifted "
        "apart, or wrap what may differ in PerRank(...)",
        kind=ErrorKind.REPLICAS_DIFFER,
        ranks={rank: f"differs from rank {other}", other: f"differs from rank {rank}"},
    )


def _warn(incomparable: Mapping[str, tuple[int, int]]) -> None:
    if incomparable:
        name, (rank, other) = next(iter(incomparable.items()))
        _log.warning(
            "%d tensors lie on a device on some ranks and in host memory on others (%s, ranks %d "
            "and %d): they were not compared",
            len(incomparable),
            name,
            rank,
            other,
        )
