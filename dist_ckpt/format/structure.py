"""The structure of a checkpoint of format 2: its tensors, and which rank holds which box of them.

Tensors that are cut alike share one `Layout`, so what this takes grows with the ranks and with the
tensors, not with their product. It is the same for every save of a job that keeps its structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.index import Box, TensorEntry, check_tensors, find_uncovered
from dist_ckpt.format.names import (
    MAX_NDIM,
    MOST_NAMES,
    RANK_LIMIT,
    Column,
    bad_index,
    check_distinct,
    check_lengths,
    column,
    deflate,
    inflate,
    positions,
    read_column,
    runs,
)

# format-2, section 3.2.
MOST_CHUNKS = 1 << 31
MOST_BYTES = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors are cut.

    Attributes:
        rank: int64[n], who holds each box.
        starts: int64[n, d], its first index.
        sizes: int64[n, d], its extent.
    """

    rank: Column
    starts: Column
    sizes: Column

    def holders(self, box: Box) -> Column:
        """Return the ranks that hold an element of `box`, some of them several times."""
        low = np.array(box.offsets, np.int64)
        high = low + np.array(box.sizes, np.int64)
        touch = np.maximum(self.starts, low) < np.minimum(self.starts + self.sizes, high)
        # Of a scalar no dimension can miss, and `all` of nothing is true.
        found: Column = self.rank[touch.all(axis=1)]
        return found


@dataclass(frozen=True, eq=False)
class RankChunks:
    """The chunks of one rank, by tensor and then in the order of its layout.

    Attributes:
        tensor: int64[n], the number of the tensor.
        row: int64[n], which row of its layout it is.
        boxes: flat int64, for each chunk `d` starts, then `d` sizes.
    """

    tensor: Column
    row: Column
    boxes: Column


@dataclass(frozen=True, eq=False)
class _Rows:
    """The boxes of all layouts, sorted by rank.

    Attributes:
        rank: int64[n], who holds it.
        layout: int64[n], of which layout it is.
        row: int64[n], which row of it.
        place: int64[n], where in `boxes` it begins.
        boxes: flat int64, for each box `d` starts, then `d` sizes, layout by layout.
        own: the tensors with chunks of their own, by layout.
        first_own: int64[layouts + 1], where in `own` those of each layout begin.
    """

    rank: Column
    layout: Column
    row: Column
    place: Column
    boxes: Column
    own: Column
    first_own: Column

    def slice_of(self, rank: int) -> slice:
        first, last = np.searchsorted(self.rank, (rank, rank + 1)).tolist()
        return slice(first, last)


@dataclass(frozen=True, eq=False)
class Structure:
    """All that is the same from save to save.

    Attributes:
        tensors: every tensor of every part.
        layout: int64[t], how each is cut: a position in `layouts`.
        owner: int64[t], the tensor whose bytes are its bytes: its own number, or one before it.
        layouts: each of them that of some tensor.
    """

    tensors: tuple[TensorEntry, ...]
    layout: Column
    owner: Column
    layouts: tuple[Layout, ...]

    @cached_property
    def ndim(self) -> Column:
        """The dimensions of each tensor."""
        return np.array([len(tensor.shape) for tensor in self.tensors], np.int64)

    @cached_property
    def _rows(self) -> _Rows:
        """The boxes of all layouts, by the rank that holds them."""
        ndim = np.array([each.starts.shape[1] for each in self.layouts], np.int64)
        counts = np.array([len(each.rank) for each in self.layouts], np.int64)
        rank = _joined([each.rank for each in self.layouts])
        # Sorted once: the boxes of a rank are then one slice, however many ranks there are.
        order = np.argsort(rank, kind="stable")
        # A tied tensor has no chunks of its own: those of its owner are its bytes.
        own = np.flatnonzero(self.owner == np.arange(len(self.owner)))
        return _Rows(
            rank[order],
            np.repeat(np.arange(len(counts)), counts)[order],
            runs(np.zeros(len(counts), np.int64), counts)[order],
            positions(np.repeat(2 * ndim, counts))[:-1][order],
            _joined([np.concatenate([each.starts, each.sizes], axis=1) for each in self.layouts]),
            own[np.argsort(self.layout[own], kind="stable")],
            positions(np.bincount(self.layout[own], minlength=len(counts))),
        )

    @property
    def ranks(self) -> Column:
        """The ranks that hold a box, ascending."""
        return np.unique(self._rows.rank)

    def count_of(self, rank: int) -> int:
        """Return how many chunks `rank` has; nothing is made of that length."""
        table = self._rows
        layout = table.layout[table.slice_of(rank)]
        return int((table.first_own[layout + 1] - table.first_own[layout]).sum())

    def chunks_of(self, rank: int) -> RankChunks:
        """Return the chunks that `rank` has."""
        table = self._rows
        mine = table.slice_of(rank)
        first = table.first_own[table.layout[mine]]
        counts = table.first_own[table.layout[mine] + 1] - first
        tensor = table.own[runs(first, counts)]
        row = np.repeat(table.row[mine], counts)
        place = np.repeat(table.place[mine], counts)
        # The order of format-2, section 4, in which a segment lists its chunks.
        order = np.lexsort((row, tensor))
        tensor = tensor[order]
        boxes = table.boxes[runs(place[order], 2 * self.ndim[tensor])]
        return RankChunks(tensor, row[order], boxes)

    def holders(self, wanted: Iterable[tuple[int, Box]]) -> Column:
        """Return the ranks that hold an element of boxes of tensors, ascending.

        Args:
            wanted: the number of a tensor and a box of it, each.
        """
        # By layout and not by tensor: what thousands of tensors have alike is asked once.
        distinct = {(int(self.layout[number]), box.offsets, box.sizes) for number, box in wanted}
        found = [
            self.layouts[number].holders(Box(offsets, sizes)) for number, offsets, sizes in distinct
        ]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


@decodable
class _Table(msgspec.Struct, forbid_unknown_fields=True):
    parts: Annotated[list[str], msgspec.Meta(max_length=MOST_NAMES)]
    dtypes: Annotated[list[str], msgspec.Meta(max_length=MOST_NAMES)]
    names: Annotated[list[str], msgspec.Meta(max_length=MOST_NAMES)]
    part: bytes
    dtype: bytes
    ndim: bytes
    shape: bytes
    layout: bytes
    back: bytes
    rows: bytes
    rank: bytes
    start: bytes
    size: bytes


def encode(structure: Structure) -> bytes:
    """Return the bytes of `structure`, having read them back.

    Raises:
        IntegrityError: `decode` would refuse them; the message says why.
        UsageError: a name is not Unicode text, or there is too much of it.
    """
    tensors, layouts = structure.tensors, structure.layouts
    parts = list(dict.fromkeys(tensor.part for tensor in tensors))
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    data = deflate(
        _Table(
            parts,
            dtypes,
            [tensor.name for tensor in tensors],
            column([parts.index(tensor.part) for tensor in tensors]),
            column([dtypes.index(tensor.dtype) for tensor in tensors]),
            column(structure.ndim),
            column([size for tensor in tensors for size in tensor.shape]),
            column(structure.layout),
            # How far back, and not which: that is 0 wherever nothing is tied.
            column(np.arange(len(tensors)) - structure.owner),
            column([len(each.rank) for each in layouts]),
            column(_joined([each.rank for each in layouts])),
            # One dimension after another, where numbers rise evenly and their differences repeat.
            column(_joined([each.starts.T for each in layouts])),
            column(_joined([each.sizes.T for each in layouts])),
        )
    )
    # Nothing may be committed that no reader would take.
    decode(data)
    return data


def decode(data: bytes) -> Structure:
    """Read a structure, trusting nothing in it.

    Raises:
        IntegrityError: bad_index, or boxes that do not tile their tensor.
        IncompatibleError: a newer release wrote it.
    """
    table = inflate(data, _Table, where="the structure")
    tensors = _tensors(table)
    # Before any box: the arithmetic of boxes rests on sizes whose product int64 holds.
    check_tensors(tensors)
    count = len(tensors)
    rows = read_column(table.rows, most=MOST_CHUNKS, where="the count of boxes")
    # Without any layout `most` is -1, and so every number is refused.
    layout = read_column(table.layout, most=len(rows) - 1, where="the layout of a tensor")
    back = read_column(table.back, most=max(count - 1, 0), where="a tie")
    check_lengths("tensors", (len(layout), count), (len(back), count))
    owner = np.arange(count, dtype=np.int64) - back
    found = Structure(tensors, layout, owner, _layouts(table, rows, tensors, layout))
    _check_ties(found)
    untied = np.bincount(layout[back == 0], minlength=len(rows)).tolist()
    # In Python integers: what is claimed may be more than int64 holds.
    if sum(a * b for a, b in zip(untied, rows.tolist(), strict=True)) > MOST_CHUNKS:
        raise bad_index(f"it claims more than {MOST_CHUNKS} chunks")
    return found


def _tensors(table: _Table) -> tuple[TensorEntry, ...]:
    names = table.names
    check_distinct(table.parts, "the list of parts")
    check_distinct(table.dtypes, "the list of types")
    part = read_column(table.part, most=len(table.parts) - 1, where="the part of a tensor")
    dtype = read_column(table.dtype, most=len(table.dtypes) - 1, where="the type of a tensor")
    ndim = read_column(table.ndim, most=MAX_NDIM, where="the dimensions of a tensor")
    shape = read_column(table.shape, where="the shape of a tensor").tolist()
    lengths = [(len(each), len(names)) for each in (part, dtype, ndim)]
    check_lengths("tensors", *lengths)
    check_lengths("shapes", (len(shape), int(ndim.sum())))
    ends = positions(ndim).tolist()
    columns = zip(names, part.tolist(), dtype.tolist(), ends, ends[1:], strict=False)
    return tuple(
        TensorEntry(table.parts[p], name, table.dtypes[d], tuple(shape[first:last]))
        for name, p, d, first, last in columns
    )


def _layouts(
    table: _Table, rows: Column, tensors: Sequence[TensorEntry], layout: Column
) -> tuple[Layout, ...]:
    shapes = _shapes(tensors, layout, len(rows))
    ndim = np.array([len(shape) for shape in shapes], np.int64)
    rank = read_column(table.rank, most=RANK_LIMIT - 1, where="the rank of a box")
    start = read_column(table.start, where="the start of a box")
    size = read_column(table.size, where="the size of a box")
    # In Python integers, and before anything is made of the length that they claim.
    numbers = sum(r * d for r, d in zip(rows.tolist(), ndim.tolist(), strict=True))
    check_lengths("boxes", (len(rank), sum(rows.tolist())))
    check_lengths("boxes", (len(start), numbers), (len(size), numbers))
    ends, places = positions(rows).tolist(), positions(rows * ndim).tolist()
    layouts = []
    for number, shape in enumerate(shapes):
        mine = slice(places[number], places[number + 1])
        starts, sizes = (
            np.ascontiguousarray(each[mine].reshape(len(shape), -1).T)
            # Nothing is stored of no dimensions, and nothing says then how many rows to make of it.
            if shape
            else np.zeros((int(rows[number]), 0), np.int64)
            for each in (start, size)
        )
        layouts.append(Layout(rank[ends[number] : ends[number + 1]], starts, sizes))
    _check_tiles(shapes, layouts, tensors, layout)
    return tuple(layouts)


def _shapes(tensors: Sequence[TensorEntry], layout: Column, count: int) -> list[tuple[int, ...]]:
    """Return the one shape of the tensors of each layout."""
    found: dict[int, tuple[int, ...]] = {}
    for tensor, number in zip(tensors, layout.tolist(), strict=True):
        if found.setdefault(number, tensor.shape) != tensor.shape:
            raise bad_index(f"tensor {tensor.name!r} is cut as one of another shape")
    # Its shape is known from nowhere, so nobody could tell whether its boxes tile one.
    if len(found) != count:
        raise bad_index("a layout is of no tensor")
    return [found[number] for number in range(count)]


def _check_tiles(
    shapes: Sequence[tuple[int, ...]],
    layouts: Sequence[Layout],
    tensors: Sequence[TensorEntry],
    layout: Column,
) -> None:
    # Arrays are rectangular: layouts of as many dimensions are checked in one go.
    by_ndim: dict[int, list[int]] = {}
    for number, shape in enumerate(shapes):
        by_ndim.setdefault(len(shape), []).append(number)
    for ndim, numbers in by_ndim.items():
        bad = find_uncovered(
            np.array([shapes[number] for number in numbers], np.int64).reshape(len(numbers), ndim),
            np.array([len(layouts[number].rank) for number in numbers], np.int64),
            np.concatenate([layouts[number].starts for number in numbers]),
            np.concatenate([layouts[number].sizes for number in numbers]),
        )
        if bad is not None:
            tensor = tensors[int(np.argmax(layout == numbers[bad[0]]))]
            raise IntegrityError(
                f"index: the chunks of tensor {tensor.name!r} of part {tensor.part!r} do not hold "
                f"each element once: {bad[1]}. Use another checkpoint",
                kind=ErrorKind.COVERAGE,
            )


def _check_ties(structure: Structure) -> None:
    own = np.arange(len(structure.owner))
    for number in np.flatnonzero(structure.owner != own).tolist():
        other = int(structure.owner[number])
        tied, tensor = structure.tensors[number], structure.tensors[other]
        same = msgspec.structs.replace(tied, name=tensor.name) == tensor
        alike = structure.layout[number] == structure.layout[other]
        # That refuses ties which reach before the first tensor as well: no negative number owns
        # itself, as none reaches back as far as there are tensors.
        if not (same and alike and structure.owner[other] == other):
            raise bad_index(f"tensor {tied.name!r} cannot have the bytes of {tensor.name!r}")


def _joined(many: Sequence[Column]) -> Column:
    # With one of no numbers in front, as numpy cannot join nothing.
    return np.concatenate([np.zeros(0, np.int64), *(each.reshape(-1) for each in many)])


Cut = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A box: the rank that holds it, its offsets, its sizes."""


def structure_of(
    cuts: Mapping[TensorEntry, Sequence[Cut]], owners: Mapping[TensorEntry, TensorEntry]
) -> Structure:
    """Return the structure of tensors that are cut in any way.

    Args:
        cuts: the boxes of each tensor, in any order; those of a tied one are not looked at.
        owners: for each tied tensor the one before it whose bytes are its bytes.
    """
    numbers = {tensor: number for number, tensor in enumerate(cuts)}
    known: dict[object, int] = {}
    layouts: list[Layout] = []
    layout: list[int] = []
    for tensor in cuts:
        # Sorted, so that tensors cut alike share a layout in whatever order their boxes were given.
        boxes = tuple(sorted(cuts[owners.get(tensor, tensor)], key=lambda cut: cut[1]))
        number = known.setdefault((tensor.shape, boxes), len(layouts))
        if number == len(layouts):
            layouts.append(_layout(boxes, len(tensor.shape)))
        layout.append(number)
    owner = [numbers[owners.get(tensor, tensor)] for tensor in cuts]
    columns = (np.array(layout, np.int64), np.array(owner, np.int64))
    return Structure(tuple(cuts), *columns, tuple(layouts))


def _layout(boxes: Sequence[Cut], ndim: int) -> Layout:
    ranks, starts, sizes = ([cut[i] for cut in boxes] for i in range(3))
    shape = (len(boxes), ndim)
    return Layout(
        np.array(ranks, np.int64),
        np.array(starts, np.int64).reshape(shape),
        np.array(sizes, np.int64).reshape(shape),
    )
