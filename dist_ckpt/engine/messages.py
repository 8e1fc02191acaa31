"""What ranks say to one another during a save: plain data, decoded strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from dist_ckpt.dcp.metadata import Document, WrittenFile
from dist_ckpt.dcp.owners import Owned
from dist_ckpt.dcp.planner import Held
from dist_ckpt.errors import UsageError

ObjectName = tuple[str, str]
"""Part and name of an encoded value."""

MessageT = TypeVar("MessageT", bound=msgspec.Struct)


class PlanRequest(msgspec.Struct, frozen=True):
    """First word of a save: small, whatever the state holds.

    Attributes:
        step: what this rank was asked to save.
        url: where to.
        plan: the number of the plan that this rank has for what it holds now, None without one.
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
    shared: dict[int, str]
    replicas: dict[int, bytes] = {}
    options: dict[str, str] = {}
    busy: bool = False
    earlier: dict[str, object] = {}


class LoadRequest(msgspec.Struct, frozen=True):
    """First word of a load.

    Attributes:
        step: what this rank was asked to load, None for the newest.
        url: where from.
        options: how, each option as text.
    """

    step: int | None
    url: str
    options: dict[str, str] = {}


class PlanAnswer(msgspec.Struct, frozen=True):
    """The coordinator's answer to the first words of all ranks.

    Attributes:
        save_id: under which id to write; empty when the save is skipped.
        plan_holds: whether the plan of the save before still holds.
        skip: whether nothing is saved, on any rank, because some rank was busy.
        turn: which sample of the replicas to take for the next save.
        suspicious: whether the samples differ, so that all has to be compared.
        earlier: how a save before failed, if some rank still has to tell that; else empty.
    """

    save_id: str
    plan_holds: bool
    skip: bool = False
    turn: int = 0
    suspicious: bool = False
    earlier: dict[str, object] = {}


class Description(msgspec.Struct, frozen=True):
    """All that a rank holds, sent when there is no plan yet or it no longer holds.

    Attributes:
        held: its boxes.
        objects: the digest of each encoded value, by part and name, per-rank parts excluded.
        versioned: by part and name, for values of which ranks may hold versions, the digest of
            what is equal in all of these; each part that has such values is in it.
    """

    held: list[Held]
    objects: dict[str, dict[str, str]]
    versioned: dict[str, dict[str, str]] = {}


class RankPlan(msgspec.Struct, frozen=True):
    """One rank's share of a plan.

    Attributes:
        number: which plan of the job this is.
        owned: the boxes it writes.
        objects: the encoded values it writes besides those of its per-rank parts.
        groups: the encoded values that must be equal on several ranks, by number of the group.
        replicas: positions, in what it holds, of the boxes that other ranks hold too, and that
            must have equal values there, by number of the group of ranks that hold them.
        replicated: whether any rank has such boxes.
        versions: by part and name in `objects` and `groups`, what this rank itself calls a value
            that is stored under another name.
    """

    number: int
    owned: list[Owned]
    objects: list[ObjectName]
    groups: dict[int, list[ObjectName]]
    replicas: dict[int, list[int]] = {}
    replicated: bool = False
    versions: dict[str, dict[str, str]] = {}


class ReplicaDigests(msgspec.Struct, frozen=True):
    """Digests of the boxes that a rank shares with others, in the order of `RankPlan.replicas`.

    Attributes:
        methods: for each box, one byte that says how its digest was made.
        digests: for each box, 8 bytes.
    """

    methods: bytes
    digests: bytes


class Report(msgspec.Struct, frozen=True):
    """What a rank wrote, how long it took, where it runs, and what metrics it was given."""

    files: list[WrittenFile]
    documents: list[Document]
    stage_seconds: float
    write_seconds: float
    host: str = ""
    metrics: dict[str, float] = {}


def check_same(requests: Sequence[PlanRequest] | Sequence[LoadRequest], verb: str) -> None:
    """Check that all ranks were asked for one thing.

    Args:
        requests: the first word of each rank.
        verb: what they were asked to do, for the message.

    Raises:
        UsageError: with what each rank was asked for, or two ranks and the option in which they
            differ.
    """
    for what in ("step", "url"):
        asked = {rank: getattr(request, what) for rank, request in enumerate(requests)}
        if len(set(asked.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in asked.items())
            raise UsageError(
                f"the ranks were asked to {verb} different things ({what}: {listed}): make the "
                "call with the same arguments on every rank",
                ranks={rank: str(value) for rank, value in asked.items()},
            )


def check_same_options(requests: Sequence[PlanRequest]) -> None:
    """Check that all ranks were asked to save in one way.

    Raises:
        UsageError: an option differs; the message names it and two ranks.
    """
    first = requests[0].options
    for rank, request in enumerate(requests):
        # The usual case costs one comparison; only a difference is looked for by name.
        if request.options == first:
            continue
        for name in sorted(first.keys() | request.options.keys()):
            here, there = (options.get(name, "absent") for options in (first, request.options))
            if here != there:
                raise UsageError(
                    f"the ranks save with different options ({name} is {here} on rank 0 and "
                    f"{there} on rank {rank}): pass the same options on every rank",
                    ranks={0: f"{name}: {here}", rank: f"{name}: {there}"},
                )


def pack(message: msgspec.Struct) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type[MessageT]) -> MessageT:
    """Decode a message of a known kind."""
    return msgspec.msgpack.decode(data, type=kind)
