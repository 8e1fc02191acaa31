"""What ranks say to one another during a save: plain data, decoded strictly."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from dist_ckpt.dcp.metadata import Document, WrittenFile
from dist_ckpt.dcp.owners import Owned
from dist_ckpt.dcp.planner import Held

ObjectName = tuple[str, str]
"""Part and name of an encoded value."""

MessageT = TypeVar("MessageT", bound=msgspec.Struct)


class PlanRequest(msgspec.Struct, frozen=True):
    """First word of a save: small, whatever the state holds.

    Attributes:
        step: what this rank was asked to save.
        url: where to.
        fingerprint: digest of all that the plan depends on.
        shared: digest of the encoded values of each group that several ranks hold alike.
    """

    step: int
    url: str
    fingerprint: str
    shared: dict[int, str]


class PlanAnswer(msgspec.Struct, frozen=True):
    """The coordinator's answer: under which id to write, and whether the old plan still holds."""

    save_id: str
    plan_holds: bool


class Description(msgspec.Struct, frozen=True):
    """All that a rank holds, sent when there is no plan yet or it no longer holds.

    Attributes:
        held: its boxes.
        objects: the digest of each encoded value, by part and name, per-rank parts excluded.
    """

    held: list[Held]
    objects: dict[str, dict[str, str]]


class RankPlan(msgspec.Struct, frozen=True):
    """One rank's share of a plan.

    Attributes:
        owned: the boxes it writes.
        objects: the encoded values it writes besides those of its per-rank parts.
        groups: the encoded values that must be equal on several ranks, by number of the group.
    """

    owned: list[Owned]
    objects: list[ObjectName]
    groups: dict[int, list[ObjectName]]


class Report(msgspec.Struct, frozen=True):
    """What a rank wrote, and how long it took."""

    files: list[WrittenFile]
    documents: list[Document]
    stage_seconds: float
    write_seconds: float


def pack(message: msgspec.Struct) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type[MessageT]) -> MessageT:
    """Decode a message of a known kind."""
    return msgspec.msgpack.decode(data, type=kind)
