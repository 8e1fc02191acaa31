"""What ranks say to one another during a save: plain data, decoded strictly."""

from __future__ import annotations

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.format.segments import SegmentNote
from dist_ckpt.planning.owners import Owned, OwnedShare

ObjectName = tuple[str, str]
"""Part and name of an encoded value."""


@decodable
class PlanRequest(msgspec.Struct, frozen=True):
    """First word of a save: small, whatever the state holds.

    Attributes:
        step: what this rank was asked to save.
        url: where to.
        plan: the number of the plan that this rank has for what it holds now, None without one.
        table: digest of the table of what it holds.
        shared: digest of the encoded values of each group that several ranks hold alike.
        replicas: digest of a sample of the boxes of each group that several ranks hold alike; the
            first byte says how it was made.
        options: how it was asked to save, by the name of the option, as text.
        busy: whether it would rather skip this save, because one is in flight here.
        earlier: how a save before failed, if nobody was told of it on this rank; else empty.
    """

    step: int
    url: str
    plan: int | None
    table: str
    shared: dict[int, str]
    replicas: dict[int, bytes] = {}
    options: dict[str, str] = {}
    busy: bool = False
    earlier: dict[str, object] = {}


@decodable
class PlanAnswer(msgspec.Struct, frozen=True):
    """The coordinator's answer to the first words of all ranks.

    Attributes:
        save_id: under which id to write; empty when the save is skipped.
        plan_holds: whether the plan of the save before still holds.
        skip: whether nothing is saved, on any rank, because some rank was busy.
        turn: which sample of the replicas to take for the next save.
        suspicious: whether the samples differ, so that all has to be compared.
        earlier: how a save before failed, if some rank still has to tell that; else empty.
        table: whether this rank is to send the table of what it holds: of ranks alike one is.
    """

    save_id: str
    plan_holds: bool
    skip: bool = False
    turn: int = 0
    suspicious: bool = False
    earlier: dict[str, object] = {}
    table: bool = False


@decodable
class Description(msgspec.Struct, frozen=True):
    """All that a rank holds, sent when there is no plan yet or it no longer holds.

    Attributes:
        digest: of the table of what it holds.
        table: the table; empty where another rank sends the same.
        numbers: of its boxes (`dist_ckpt.planning.columns`).
        objects: the digest of each encoded value, by part and name, per-rank parts excluded.
        versioned: by part and name, for values of which ranks may hold versions, the digest of
            what is equal in all of these; each part that has such values is in it.
        per_rank: the names of its per-rank parts; those of the others are in `objects`.
    """

    digest: str
    table: bytes
    numbers: bytes
    objects: dict[str, dict[str, str]]
    versioned: dict[str, dict[str, str]] = {}
    per_rank: list[str] = []


@decodable
class RankPlan(msgspec.Struct, frozen=True):
    """One rank's share of a plan.

    Attributes:
        number: which plan of the job this is.
        share: the boxes it writes, as they travel.
        objects: the encoded values it writes besides those of its per-rank parts.
        groups: the encoded values that must be equal on several ranks, by number of the group.
        alike: positions, in what it holds, of the boxes that other ranks hold too, and that must
            have equal values there, by number of the group of ranks that hold them; as they travel
            (`dist_ckpt.planning.columns.unpack_runs`).
        replicated: whether any rank has such boxes.
        versions: by part and name in `objects` and `groups`, what this rank itself calls a value
            that is stored under another name.
        tensors: for each box that it holds, the number of its tensor in the checkpoint; likewise.
        twin_of: the rank of another host that writes the same boxes into the same files there;
            None where nobody does.
        owned: the boxes it writes; the rank finds them in `share`.
        numbers: the numbers that `tensors` has; likewise.
        replicas: the positions that `alike` has; likewise.
    """

    number: int
    share: OwnedShare
    objects: list[ObjectName]
    groups: dict[int, list[ObjectName]]
    alike: dict[int, bytes] = {}
    replicated: bool = False
    versions: dict[str, dict[str, str]] = {}
    tensors: bytes = b""
    twin_of: int | None = None
    owned: list[Owned] = []
    numbers: list[int] = []
    replicas: dict[int, list[int]] = {}


@decodable
class ReplicaDigests(msgspec.Struct, frozen=True):
    """Digests of the boxes that a rank shares with others, in the order of `RankPlan.replicas`.

    Attributes:
        methods: for each box, one byte that says how its digest was made.
        digests: for each box, 8 bytes.
    """

    methods: bytes
    digests: bytes


@decodable
class ReplicaSums(msgspec.Struct, frozen=True):
    """Digests of what a rank shares with others, all boxes of a group in one: the first word.

    Attributes:
        groups: by the number of the group in `RankPlan.replicas`.
    """

    groups: dict[int, bytes]


@decodable
class Report(msgspec.Struct, frozen=True):
    """What a rank wrote, how long it took, where it runs, and what metrics it was given.

    Attributes:
        segment: what the root has to say of its segment; None where it wrote no file.
        plan: the number of the plan whose boxes it wrote.
        stage_seconds: how long its training waited.
        write_seconds: how long it wrote.
        host: where it runs.
        metrics: what it was given.
    """

    segment: SegmentNote | None
    plan: int
    stage_seconds: float
    write_seconds: float
    host: str = ""
    metrics: dict[str, float] = {}
