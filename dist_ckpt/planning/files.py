"""From what a rank owns to the image of its files, and the index of where each box lies.

`plan_files` is pure, so the coordinator computes the byte layout of every rank's files from the
plan alone, and no layout ever travels. `lay_out` puts the images of files into the arena, and a
`BoxCopy` knows from where to where each box is copied.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count

import msgspec
import numpy as np
import torch

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.files import (
    ALIGN_BYTES,
    FileEntry,
    ShardEntry,
    ShardLayout,
    entry_nbytes,
    layout,
)
from dist_ckpt.format.index import Box, Held, Index, ObjectEntry, TensorEntry, is_whole
from dist_ckpt.format.names import EXTRA, chunk_name, shard_name
from dist_ckpt.format.segments import Segment
from dist_ckpt.format.structure import Layout, RankChunks, Structure
from dist_ckpt.planning.columns import HeldByRank, Numbers, pack_runs
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.planning.holdings import Holdings, TensorKey
from dist_ckpt.planning.owners import Owned, OwnedByRank
from dist_ckpt.staging.arena import Arena, aligned, as_tensor
from dist_ckpt.storage.disk import aligned_buffer

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
        # Numbers go on behind these, as both may have files of one part.
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
    # On a page, so that a disk takes it past the page cache without another copy.
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
        # Its size follows from the values, which no plan knows before the save.
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
    # A whole tensor bears its own name, by which other programs look for it.
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
        # One box at least, however large: what is too large was cut before, as far as it can be.
        if max_bytes is not None and i > start and aligned(file_bytes) > max_bytes:
            yield start, i
            start, text_bytes, data_bytes = i, _FRAME_BYTES, 0
        text_bytes += text
        data_bytes += data
    yield start, len(entries)


# The index of a save: where each box of each tensor came to lie.


def versions() -> dict[str, str]:
    """Return what a manifest says of the programs that wrote it."""
    try:
        own = version("dist_ckpt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        own = "unknown"
    return {"dist_ckpt": own, "torch": str(torch.__version__), "python": platform.python_version()}


@decodable
class WrittenFile(msgspec.Struct, frozen=True, array_like=True):
    """What a rank reports of one file: its size, and of each block the digest and the length."""

    name: str
    nbytes: int
    blocks: bytes
    lengths: Sequence[int]


@decodable
class Document(msgspec.Struct, frozen=True, array_like=True):
    """The encoded values of one part that a rank wrote into its `extra` file."""

    part: str
    per_rank: bool
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class RankShare:
    """All that the coordinator knows of one rank's share of a save."""

    held: Sequence[Held]
    owned: Sequence[Owned]
    files: Sequence[WrittenFile]
    documents: Sequence[Document]


def build_index(
    shares: Sequence[RankShare],
    *,
    ties: Mapping[TensorKey, str] | None = None,
    max_file_bytes: int | None = None,
) -> Index:
    """Check every rank's report against the plan and describe the whole checkpoint.

    Args:
        shares: by rank.
        ties: by tensor, the one in its part whose bytes are its bytes too.
        max_file_bytes: as the ranks gave it to `plan_files`.

    Raises:
        IntegrityError: a rank wrote other files than were planned.
    """
    files: list[FileEntry] = []
    tensors: dict[TensorEntry, int] = {}
    objects: list[ObjectEntry] = []
    rows: list[tuple[int, int, int, Box]] = []
    tied = _tied(ties or {})
    for rank, share in enumerate(shares):
        plans = plan_files(rank, share.held, share.owned, max_file_bytes=max_file_bytes)
        sizes = {document.part: document.nbytes for document in share.documents}
        check_reported_sizes(rank, plans, sizes, {f.name: f.nbytes for f in share.files})
        numbers = {file.name: len(files) + i for i, file in enumerate(share.files)}
        files += [FileEntry.of(f.name, f.nbytes, f.blocks, f.lengths) for f in share.files]
        for plan in plans:
            for box, offset in zip(plan.owned, plan.layout.offsets, strict=True):
                entry = share.held[box.held].tensor
                # Every name of one memory has rows of its own, which point to the same bytes.
                for name in (entry.name, *tied.get((entry.part, entry.name), ())):
                    one = TensorEntry(entry.part, name, entry.dtype, entry.shape)
                    tensor = tensors.setdefault(one, len(tensors))
                    rows.append((tensor, numbers[plan.name], offset, box.box))
        objects += _objects(rank, share.documents, numbers)
    return Index.build(files, list(tensors), objects, rows)


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """What is known of the index before anything is written: it holds as long as the plan does.

    Attributes:
        structure: of the checkpoint, encoded.
        tensors: by rank, for each box that it holds, the number of its tensor, as they travel
            (`dist_ckpt.planning.columns.unpack_runs`).
    """

    structure: bytes
    tensors: Sequence[bytes]


def plan_index(
    held_by_rank: HeldByRank, owned_by_rank: OwnedByRank, holdings: Holdings
) -> IndexPlan:
    """Describe who writes what, on the one rank that knows it of all.

    Args:
        held_by_rank: for each rank the boxes it holds.
        owned_by_rank: what it writes of them.
        holdings: the same, put together.

    Raises:
        UsageError: a name is not Unicode text, or there is too much of it.
    """
    packed = [b""] * len(held_by_rank)
    for group, numbers in zip(held_by_rank.groups, holdings.numbers, strict=True):
        told = pack_runs(numbers)
        for rank in group.ranks.tolist():  # the very same object for all: they are thousands
            packed[rank] = told
    return IndexPlan(
        structure_format.encode(_structure(held_by_rank, owned_by_rank, holdings)), packed
    )


_Chunks = tuple[Numbers, Numbers, Numbers]
"""Who writes each of some chunks, where it starts, and its extent."""


def _structure(
    held_by_rank: HeldByRank, owned_by_rank: OwnedByRank, holdings: Holdings
) -> Structure:
    count = len(holdings.tensors)
    pieces = _pieces(held_by_rank, owned_by_rank, holdings)
    whole: list[_Chunks | None] = [None] * count
    for tiles, those in owned_by_rank.whole:
        # The very same arrays for all tensors that are cut alike.
        chunks = tiles.ranks[tiles.first[:-1][those]], tiles.starts[those], tiles.sizes[those]
        for number in tiles.tensors.tolist():
            whole[number] = chunks
    owners = _owners(holdings)
    layouts, layout = _Layouts(), np.zeros(count, np.int64)
    for number, owner in enumerate(owners.tolist()):
        shape = holdings.tensors[number].shape
        # A tied tensor has the layout of its owner: format-2, section 3.2.
        layout[number] = layouts.number_of(shape, whole[owner], pieces.get(owner, []))
    return Structure(tuple(holdings.tensors), layout, owners, tuple(layouts.found))


def _owners(holdings: Holdings) -> Numbers:
    """Return for each tensor the number of the one whose bytes are its bytes."""
    owners = np.arange(len(holdings.tensors))
    if holdings.ties:
        by_key = {(one.part, one.name): number for number, one in enumerate(holdings.tensors)}
        for (part, name), other in holdings.ties.items():
            owners[by_key[part, name]] = by_key[part, other]
    return owners


def _pieces(
    held_by_rank: HeldByRank, owned_by_rank: OwnedByRank, holdings: Holdings
) -> dict[int, list[_Chunks]]:
    """Return the chunks that are not boxes as ranks hold them, by the number of the tensor."""
    group_of = np.zeros(len(held_by_rank), np.int64)
    for number, group in enumerate(held_by_rank.groups):
        group_of[group.ranks] = number
    # The tables of all groups behind one another, so that one look-up serves all ranks.
    first = np.cumsum([0, *map(len, holdings.numbers)])
    numbers = np.fromiter(chain.from_iterable(holdings.numbers), np.int64)
    found: dict[int, list[_Chunks]] = {}
    for ranks, positions, starts, sizes in owned_by_rank.piece_columns():
        of = numbers[first[group_of[ranks]] + positions]
        # Stable, so that the pieces of a tensor stay in the order of ranks.
        order = np.argsort(of, kind="stable")
        tensors, begin = np.unique(of[order], return_index=True)
        for tensor, some in zip(tensors.tolist(), np.split(order, begin[1:]), strict=True):
            found.setdefault(tensor, []).append((ranks[some], starts[some], sizes[some]))
    return found


class _Layouts:
    """The distinct layouts, in the order in which they are met."""

    def __init__(self) -> None:
        self.found: list[Layout] = []
        self._known: dict[object, int] = {}
        # By identity, as long as the arrays are there: of tensors cut alike one is looked at.
        self._whole: dict[tuple[tuple[int, ...], int], int] = {}

    def number_of(
        self, shape: tuple[int, ...], whole: _Chunks | None, pieces: Sequence[_Chunks]
    ) -> int:
        """Return the number of the layout of a tensor with these chunks."""
        if whole is None or pieces:
            return self._add(shape, [*pieces] if whole is None else [whole, *pieces])
        key = (shape, id(whole))
        if key not in self._whole:
            self._whole[key] = self._add(shape, [whole])
        return self._whole[key]

    def _add(self, shape: tuple[int, ...], chunks: Sequence[_Chunks]) -> int:
        ranks, starts, sizes = (np.concatenate(each) for each in zip(*chunks, strict=True))
        # By where they start; a number without dimensions has one chunk.
        order = np.lexsort(starts.T[::-1]) if shape else np.arange(len(ranks))
        cut = Layout(ranks[order], starts[order], sizes[order])
        key = (shape, *(part.tobytes() for part in (cut.rank, cut.starts, cut.sizes)))
        number = self._known.setdefault(key, len(self.found))
        if number == len(self.found):
            self.found.append(cut)
        return number


def describe_share(
    rank: int,
    *,
    numbers: Sequence[int],
    owned: Sequence[Owned],
    plans: Sequence[FilePlan],
    files: Sequence[WrittenFile],
    documents: Sequence[Document],
) -> Segment | None:
    """Describe what `rank` wrote.

    Args:
        rank: who wrote it.
        numbers: for each box that it holds, the number of its tensor.
        owned: the boxes that it was to write.
        plans: its files without that of the documents.
        files: those that were written, that of the documents included.
        documents: the encoded values in them.

    Returns:
        None where it wrote no file.

    Raises:
        IntegrityError: it wrote other files or other boxes than were planned.
    """
    sizes = {document.part: document.nbytes for document in documents}
    check_reported_sizes(rank, plans, sizes, {file.name: file.nbytes for file in files})
    places = {file.name: place for place, file in enumerate(files)}
    # The order of format-2, section 4: by tensor, then by where they start, as in a layout.
    rows = sorted(
        (
            (numbers[box.held], box, places[plan.name], offset)
            for plan in plans
            for box, offset in zip(plan.owned, plan.layout.offsets, strict=True)
        ),
        key=lambda row: (row[0], row[1].offsets),
    )
    boxes = [box for _, box, _, _ in rows]
    # The boxes themselves: equal files may have been laid out by another plan.
    if boxes != sorted(owned, key=lambda box: (numbers[box.held], box.offsets)):
        raise IntegrityError(
            f"rank {rank} wrote other boxes than were planned",
            kind=ErrorKind.COVERAGE,
            ranks={rank: "it wrote other boxes than were planned"},
        )
    tensor, file, offset = (np.array([row[i] for row in rows], np.int64) for i in (0, 2, 3))
    flat = [number for box in boxes for number in (*box.offsets, *box.sizes)]
    segment = Segment(
        rank,
        tuple(FileEntry.of(f.name, f.nbytes, f.blocks, f.lengths) for f in files),
        # Rows of layouts are not stored, and only the root could tell them.
        RankChunks(tensor, np.zeros(len(tensor), np.int64), np.array(flat, np.int64)),
        file,
        offset,
        tuple(_objects(rank, documents, places)),
    )
    return segment if files else None


def _tied(ties: Mapping[TensorKey, str]) -> dict[TensorKey, list[str]]:
    names: dict[TensorKey, list[str]] = {}
    for (part, name), owner in ties.items():
        names.setdefault((part, owner), []).append(name)
    return names


def _objects(
    rank: int, documents: Sequence[Document], numbers: dict[str, int]
) -> Iterator[ObjectEntry]:
    if not documents:
        return
    offsets = plan_extra({document.part: document.nbytes for document in documents}).offsets
    for document, offset in zip(documents, offsets, strict=True):
        yield ObjectEntry(
            part=document.part,
            rank=rank if document.per_rank else None,
            file=numbers[extra_name(rank)],
            offset=offset,
            nbytes=document.nbytes,
            digest=document.digest,
        )
