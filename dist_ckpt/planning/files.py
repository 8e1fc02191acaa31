"""From what a rank owns to the image of its files.

`plan_files` is pure, so the coordinator computes the byte layout of every rank's files from the
plan alone, and no layout ever travels. `lay_out` puts the images of files into the arena, and a
`BoxCopy` knows from where to where each box is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import msgspec
import torch

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.boxes import Box, is_whole
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import EXTRA, chunk_name, shard_name
from dist_ckpt.format.shard import ALIGN_BYTES, ShardEntry, ShardLayout, entry_nbytes, layout
from dist_ckpt.planning.describe import Held, LocalBox
from dist_ckpt.planning.owners import Owned
from dist_ckpt.staging.arena import Arena, aligned, as_tensor
from dist_ckpt.storage.direct import aligned_buffer

MANY_PARTS = 16
"""From so many parts on a rank puts the small ones together, so that a file is worth its cost."""

SMALL_BYTES = 16 << 20
"""Up to so many bytes a rank's share of a part is small."""

_SHARED_BYTES = 64 << 20
"""About how large a file of several parts becomes."""

_HEADER_METADATA = {"format": "pt"}  # what loaders of safetensors files look for
# What a header holds besides names: the length prefix, the metadata, and for each entry the keys
# and the longest numbers there are.
_FRAME_BYTES = 64
_FIELDS_BYTES = 128
_DIGITS_PER_DIM = 21


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of one rank: its name, its byte layout, and the boxes in it, in layout order.

    `apart` is of a file that has nothing but boxes of which other ranks may have other values.
    """

    name: str
    layout: ShardLayout
    owned: tuple[Owned, ...]
    apart: bool = False


@dataclass(frozen=True, slots=True)
class StagedFile:
    """The image of one file, ready to be written, and the lengths of its blocks."""

    name: str
    image: memoryview
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BoxCopy:
    """One box to copy, save after save: from which local box, what of it, to where.

    Attributes:
        held: position among the local boxes.
        narrow: by dimension that is not taken whole: dimension, first element, how many.
        target: the place in the image, of the sizes of the box.
    """

    held: int
    narrow: tuple[tuple[int, int, int], ...]
    target: torch.Tensor

    def source(self, local: Sequence[LocalBox]) -> torch.Tensor:
        """Return what is to be copied, as it lies in memory now."""
        view = local[self.held].memory
        for dim, start, size in self.narrow:
            view = view.narrow(dim, start, size)
        return view


def plan_files(
    rank: int,
    held: Sequence[Held],
    owned: Iterable[Owned],
    *,
    max_file_bytes: int | None = None,
    apart: bool = False,
) -> list[FilePlan]:
    """Lay out the files of each part that `rank` writes boxes of.

    Of many parts the small ones share files, which bear the name of the first one in them, and the
    names of entries there begin with their part.

    Args:
        rank: who writes.
        held: the boxes it holds.
        owned: what it writes of them.
        max_file_bytes: a part that needs more has several files; a box alone may still be larger.
            None: one file for each part.
        apart: whether boxes of which other ranks may have other values have files of their own, so
            that the others are equal wherever they are written.
    """
    boxes = list(owned)
    if apart:
        alike = [box for box in boxes if not held[box.held].unequal]
        others = [box for box in boxes if held[box.held].unequal]
        plans = plan_files(rank, held, alike, max_file_bytes=max_file_bytes)
        names = {plan.name for plan in plans}
        unequal = _plan_files(rank, held, others, max_file_bytes, taken=names)
        return [*plans, *(replace(plan, apart=True) for plan in unequal)]
    return _plan_files(rank, held, boxes, max_file_bytes)


def _plan_files(
    rank: int,
    held: Sequence[Held],
    owned: Sequence[Owned],
    max_file_bytes: int | None,
    *,
    taken: Collection[str] = (),
) -> list[FilePlan]:
    by_part: dict[str, list[Owned]] = {}
    for box in owned:
        by_part.setdefault(held[box.held].part, []).append(box)
    plans: list[FilePlan] = []
    sized = {
        part: [(box, _entry(held[box.held].tensor, box.box)) for box in boxes]
        for part, boxes in by_part.items()
    }
    small = _small(sized)
    if small:
        together = [
            (box, replace(entry, name=f"{part}.{entry.name}"))
            for part in small
            for box, entry in sized.pop(part)
        ]
        most = min(max_file_bytes or _SHARED_BYTES, _SHARED_BYTES)
        plans += _files_of(small[0], rank, together, most, taken=taken)
    for part, boxes in sized.items():
        plans += _files_of(part, rank, boxes, max_file_bytes, taken=taken)
    return plans


def plan_extra(documents: Mapping[str, int]) -> ShardLayout:
    """Lay out the `extra` file, given the size in bytes of the encoded values of each part."""
    entries = [ShardEntry(part, "uint8", (nbytes,)) for part, nbytes in documents.items()]
    return layout(entries, {})


def extra_name(rank: int) -> str:
    """Return the name of the file that holds the encoded values `rank` writes."""
    return shard_name(EXTRA, rank)


def files_nbytes(plans: Iterable[FilePlan]) -> int:
    """Return how much of an arena the images of `plans` take."""
    return sum(aligned(plan.layout.nbytes) for plan in plans)


def lay_out(arena: Arena, plans: Sequence[FilePlan]) -> list[StagedFile]:
    """Give each file its place in the arena, which was reset for them, and write its header."""
    staged = []
    for plan in plans:
        image = arena.take(plan.layout.nbytes)
        image[: len(plan.layout.header)] = plan.layout.header
        staged.append(StagedFile(plan.name, image, plan.layout.blocks))
    return staged


def box_copies(plan: FilePlan, file: StagedFile, held: Sequence[Held]) -> Iterator[BoxCopy]:
    """Yield the copies that fill the image of one file.

    Args:
        plan: the file.
        file: its place.
        held: the boxes that this rank holds.
    """
    for owned, offset in zip(plan.owned, plan.layout.offsets, strict=True):
        if 0 in owned.sizes:
            continue  # a tensor without elements has a name in the file and no bytes
        source = held[owned.held]
        dtype: torch.dtype = getattr(torch, source.dtype)
        target = as_tensor(file.image, dtype, owned.sizes, offset)
        yield BoxCopy(owned.held, _narrow(source, owned), target)


def stage_documents(rank: int, documents: Mapping[str, bytes]) -> StagedFile:
    """Return the image of the `extra` file, in memory of its own.

    Not in the arena: its size changes from save to save, and nothing else should move for that.

    Args:
        rank: who writes it.
        documents: the encoded values by part.
    """
    extra = plan_extra({part: len(data) for part, data in documents.items()})
    image = aligned_buffer(extra.nbytes)
    image[: len(extra.header)] = extra.header
    for data, offset in zip(documents.values(), extra.offsets, strict=True):
        image[offset : offset + len(data)] = data
    return StagedFile(extra_name(rank), image, extra.blocks)


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


def _small(sized: Mapping[str, Sequence[tuple[Owned, ShardEntry]]]) -> list[str]:
    """Return the parts that share files."""
    if len(sized) < MANY_PARTS:
        return []
    return [
        part
        for part, entries in sized.items()
        if sum(entry_nbytes(entry) for _, entry in entries) <= SMALL_BYTES
    ]


def _files_of(
    part: str,
    rank: int,
    boxes: Sequence[tuple[Owned, ShardEntry]],
    max_file_bytes: int | None,
    *,
    taken: Collection[str],
) -> Iterator[FilePlan]:
    entries = [entry for _, entry in boxes]
    first = next(n for n in count() if shard_name(part, rank, number=n) not in taken)
    for number, (start, stop) in enumerate(_cut(entries, max_file_bytes), first):
        planned = layout(entries[start:stop], _HEADER_METADATA)
        owned = tuple(box for box, _ in boxes[start:stop])
        yield FilePlan(shard_name(part, rank, number=number), planned, owned)


def _entry(tensor: TensorEntry, box: Box) -> ShardEntry:
    offsets = None if is_whole(box, tensor.shape) else box.offsets
    return ShardEntry(chunk_name(tensor.name, offsets), tensor.dtype, box.sizes)


def _narrow(source: Held, owned: Owned) -> tuple[tuple[int, int, int], ...]:
    dims = enumerate(zip(owned.offsets, source.offsets, owned.sizes, source.sizes, strict=True))
    return tuple(
        (dim, start - origin, size) for dim, (start, origin, size, width) in dims if size < width
    )


def _cut(entries: Sequence[ShardEntry], max_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Yield the ranges of entries that go into one file each: as many as surely fit."""
    start, text_bytes, data_bytes = 0, _FRAME_BYTES, 0
    for i, entry in enumerate(entries if max_bytes is not None else ()):
        # The exact length depends on numbers that depend on it; a bound is as good here.
        name_bytes = len(msgspec.json.encode(entry.name))
        text = name_bytes + _FIELDS_BYTES + _DIGITS_PER_DIM * (len(entry.shape) + 1)
        data = entry_nbytes(entry)
        file_bytes = text_bytes + text + ALIGN_BYTES + data_bytes + data
        if max_bytes is not None and i > start and aligned(file_bytes) > max_bytes:
            yield start, i
            start, text_bytes, data_bytes = i, _FRAME_BYTES, 0
        text_bytes += text
        data_bytes += data
    yield start, len(entries)
