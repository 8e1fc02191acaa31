"""The index of a save: where each box of each tensor came to lie."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain

import msgspec
import numpy as np
import torch

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.segment import Segment
from dist_ckpt.format.structure import Layout, RankChunks, Structure
from dist_ckpt.planning.columns import HeldByRank, Numbers, pack_steps
from dist_ckpt.planning.describe import Held
from dist_ckpt.planning.files import (
    FilePlan,
    check_reported_sizes,
    extra_name,
    plan_extra,
    plan_files,
)
from dist_ckpt.planning.holdings import Holdings, TensorKey
from dist_ckpt.planning.owners import Owned, OwnedByRank


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
            (`dist_ckpt.planning.columns.unpack_steps`).
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
        told = pack_steps(numbers)
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
    first = np.cumsum([0, *map(len, holdings.numbers)])
    numbers = np.fromiter(chain.from_iterable(holdings.numbers), np.int64)
    found: dict[int, list[_Chunks]] = {}
    for ranks, positions, starts, sizes in owned_by_rank.piece_columns():
        of = numbers[first[group_of[ranks]] + positions]
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
    rows = sorted(
        (
            (numbers[box.held], box, places[plan.name], offset)
            for plan in plans
            for box, offset in zip(plan.owned, plan.layout.offsets, strict=True)
        ),
        key=lambda row: (row[0], row[1].offsets),
    )
    boxes = [box for _, box, _, _ in rows]
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
