"""From what a rank owns to the image of its files.

`plan_files` is pure, so the coordinator computes the byte layout of every rank's files from the
plan alone, and no layout ever travels. `stage` fills the arena with this rank's share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_ckpt.dcp.owners import Owned
from dist_ckpt.dcp.planner import Held, LocalBox
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.boxes import Box, is_whole, volume
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import EXTRA, chunk_name, shard_name
from dist_ckpt.format.shard import ShardEntry, ShardLayout, layout
from dist_ckpt.staging.arena import Arena, aligned, as_tensor
from dist_ckpt.staging.copy import copy_box

_HEADER_METADATA = {"format": "pt"}  # what loaders of safetensors files look for


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of one rank: its name, its byte layout, and the boxes in it, in layout order."""

    name: str
    layout: ShardLayout
    owned: tuple[Owned, ...]


@dataclass(frozen=True, slots=True)
class StagedFile:
    """The image of one file in the arena, ready to be written."""

    name: str
    image: memoryview


def plan_files(rank: int, held: Sequence[Held], owned: Iterable[Owned]) -> list[FilePlan]:
    """Lay out one file for each part that `rank` writes boxes of."""
    by_part: dict[str, list[Owned]] = {}
    for box in owned:
        by_part.setdefault(held[box.held].part, []).append(box)
    plans = []
    for part, boxes in by_part.items():
        entries = [_entry(held[box.held].tensor, box.box) for box in boxes]
        name = shard_name(part, rank)
        plans.append(FilePlan(name, layout(entries, _HEADER_METADATA), tuple(boxes)))
    return plans


def plan_extra(documents: Mapping[str, int]) -> ShardLayout:
    """Lay out the `extra` file, given the size in bytes of the encoded values of each part."""
    entries = [ShardEntry(part, "uint8", (nbytes,)) for part, nbytes in documents.items()]
    return layout(entries, {})


def extra_name(rank: int) -> str:
    """Return the name of the file that holds the encoded values `rank` writes."""
    return shard_name(EXTRA, rank)


def stage(
    arena: Arena,
    *,
    rank: int,
    local: Sequence[LocalBox],
    plans: Sequence[FilePlan],
    documents: Mapping[str, bytes],
) -> list[StagedFile]:
    """Copy what `rank` writes into the arena, each box once, straight to its place in the file.

    Args:
        arena: reused memory; nobody reads its old contents any more.
        rank: this rank.
        local: what it holds, in the order that was described.
        plans: its files.
        documents: the encoded values it writes, by part.
    """
    extra = plan_extra({part: len(data) for part, data in documents.items()}) if documents else None
    layouts = [plan.layout for plan in plans] + ([extra] if extra else [])
    arena.reset(sum(aligned(each.nbytes) for each in layouts))
    staged: list[StagedFile] = []
    for plan in plans:
        image = _image(arena, plan.layout)
        for box, offset in zip(plan.owned, plan.layout.offsets, strict=True):
            _stage_box(image, offset, local[box.held], box.box)
        staged.append(StagedFile(plan.name, image))
    if extra:
        image = _image(arena, extra)
        for data, offset in zip(documents.values(), extra.offsets, strict=True):
            image[offset : offset + len(data)] = data
        staged.append(StagedFile(extra_name(rank), image))
    return staged


def check_reported_sizes(
    rank: int, plans: Sequence[FilePlan], documents: Mapping[str, int], reported: Mapping[str, int]
) -> None:
    """Check that a rank wrote each planned file, and no other, with the planned size in bytes.

    Raises:
        IntegrityError: it did not; the message names the rank and a file.
    """
    planned = {plan.name: plan.layout.nbytes for plan in plans}
    if documents:
        planned[extra_name(rank)] = plan_extra(documents).nbytes
    if planned != dict(reported):
        names = sorted(
            name
            for name in planned.keys() | reported.keys()
            if planned.get(name) != reported.get(name)
        )
        raise IntegrityError(
            f"rank {rank} wrote other files than were planned: {', '.join(names[:3])}",
            kind=ErrorKind.COVERAGE,
            ranks={rank: f"planned {planned}, reported {dict(reported)}"},
        )


def _entry(tensor: TensorEntry, box: Box) -> ShardEntry:
    offsets = None if is_whole(box, tensor.shape) else box.offsets
    return ShardEntry(chunk_name(tensor.name, offsets), tensor.dtype, box.sizes)


def _image(arena: Arena, planned: ShardLayout) -> memoryview:
    image = arena.take(planned.nbytes)
    image[: len(planned.header)] = planned.header
    return image


def _stage_box(image: memoryview, offset: int, source: LocalBox, box: Box) -> None:
    if volume(box) == 0:
        return  # a tensor without elements has a name in the file and no bytes
    target = as_tensor(image, source.memory.dtype, box.sizes, offset)
    copy_box(target, source.memory, box, origin=source.held.offsets)
