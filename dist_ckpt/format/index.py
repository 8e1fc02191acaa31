"""The index: which tensors a checkpoint has, in which boxes, and in which file each of those lies.

A box is an axis-aligned block of elements of a tensor; what can be computed from boxes alone is
here too. Stored boxes, the chunks, are columns, not objects: a checkpoint of thousands of ranks has
millions of them. How all of it is written differs from format to format: in format 1 as one object
(`dist_ckpt.format.whole`), in format 2 by each rank (`dist_ckpt.format.segments`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import UsageError
from dist_ckpt.format.files import DTYPES, FileEntry
from dist_ckpt.format.names import INT64_MAX, bad_index, count_elements, is_part


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `offsets[i] <= index[i] < offsets[i] + sizes[i]` of a tensor.

    A box of a 0-dim tensor has no offsets and holds its one element.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def volume(box: Box) -> int:
    """Return the number of elements of `box`."""
    return math.prod(box.sizes)


def intersect(first: Box, second: Box) -> Box | None:
    """Return the box of the elements that both hold, or None where there is none.

    Raises:
        UsageError: the boxes differ in their number of dimensions.
    """
    _check_ndim(first, second)
    offsets = tuple(max(a, b) for a, b in zip(first.offsets, second.offsets, strict=True))
    ends = map(min, _stops(first), _stops(second))
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def is_whole(box: Box, shape: Sequence[int]) -> bool:
    """Tell whether `box` is all of a tensor of `shape`."""
    return not any(box.offsets) and box.sizes == tuple(shape)


def split_rows(box: Box, pieces: int) -> list[Box]:
    """Cut `box` along its first dimension of more than one element, in order of its elements.

    Each piece is contiguous in the C order of `box`; sizes differ by at most one row, the larger
    ones first. There are never more pieces than rows, so none is empty; a box of no element or of
    one comes back as it is.

    Raises:
        UsageError: `pieces` is less than one.
    """
    if pieces < 1:
        raise UsageError(f"cannot split a box into {pieces} pieces: ask for at least one")
    dim = next((i for i, size in enumerate(box.sizes) if size > 1), None)
    if dim is None or volume(box) == 0:
        return [box]
    rows = box.sizes[dim]
    count = min(pieces, rows)
    short, longer = divmod(rows, count)
    result: list[Box] = []
    start = box.offsets[dim]
    for i in range(count):
        size = short + (i < longer)
        offsets = (*box.offsets[:dim], start, *box.offsets[dim + 1 :])
        result.append(Box(offsets, (*box.sizes[:dim], size, *box.sizes[dim + 1 :])))
        start += size
    return result


def element_span(outer: Box, inner: Box) -> tuple[int, int]:
    """Return the smallest range (first, stop) of elements of `outer` that covers `inner`.

    Elements are counted in the C order of `outer`, from its first one. An `inner` without
    elements has the span (0, 0).

    Raises:
        UsageError: `inner` is not inside `outer`.
    """
    _check_ndim(outer, inner)
    if volume(inner) == 0:
        return 0, 0
    inside = zip(outer.offsets, inner.offsets, _stops(inner), _stops(outer), strict=True)
    if not all(low <= start and stop <= high for low, start, stop, high in inside):
        raise UsageError(f"{inner} is not inside {outer}: intersect them first")
    first = last = 0
    for dim, width in enumerate(outer.sizes):
        start = inner.offsets[dim] - outer.offsets[dim]
        first = first * width + start
        last = last * width + start + inner.sizes[dim] - 1
    return first, last + 1


def run_boxes(outer: Box, first: int, stop: int) -> list[Box]:
    """Return the boxes that hold the elements `first` up to `stop` of `outer`, in their order.

    Elements are counted as in `element_span`. At most two boxes for each dimension: the rest of
    the row that `first` is in, whole rows, and the begin of the row that `stop` is in.

    Raises:
        UsageError: the elements are none, or not inside `outer`.
    """
    if not 0 <= first < stop <= volume(outer):
        raise UsageError(f"elements {first} to {stop} are not inside {outer}, or none")
    return [
        Box(tuple(a + b for a, b in zip(outer.offsets, offsets, strict=True)), sizes)
        for offsets, sizes in _runs(outer.sizes, first, stop)
    ]


_Run = tuple[tuple[int, ...], tuple[int, ...]]


def _runs(sizes: tuple[int, ...], first: int, stop: int) -> list[_Run]:
    """Return (offsets, sizes) of `run_boxes`, relative to the outer box."""
    if not sizes:
        return [((), ())]
    inner = sizes[1:]
    row_elements = math.prod(inner)
    row, begin = divmod(first, row_elements)
    last, end = divmod(stop, row_elements)
    if row == last:
        return _in_row(row, _runs(inner, begin, end))
    head: list[_Run] = []
    if begin:
        head = _in_row(row, _runs(inner, begin, row_elements))
        row += 1
    rows = [((row, *(0 for _ in inner)), (last - row, *inner))] if row < last else []
    tail = _in_row(last, _runs(inner, 0, end)) if end else []
    return [*head, *rows, *tail]


def _in_row(row: int, runs: Sequence[_Run]) -> list[_Run]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in runs]


def _stops(box: Box) -> list[int]:
    return [start + size for start, size in zip(box.offsets, box.sizes, strict=True)]


def _check_ndim(first: Box, second: Box) -> None:
    if len(first.offsets) != len(second.offsets):
        raise UsageError(f"{first} and {second} differ in their number of dimensions")


# Do the chunks of each tensor hold every element exactly once? Exact, and near-linear.
#
# Chunks that differ in one dimension only, which is how almost all tensors are cut, are checked
# as chains: each one starts where the one before it ends. What is left is checked by its corners.
# The function that counts how many boxes hold an element is the sum of the boxes, and a sum of
# boxes is fixed by its corners, each with the sign that alternates from corner to corner: boxes
# tile a tensor if and only if their corners cancel against those of the whole tensor. Nothing
# here allocates by a claimed size, only by the number of chunks.


Rows = NDArray[np.int64]

# Corners alive at once, for each chunk: boxes that tile cancel long before this.
_MAX_CORNERS_PER_BOX = 64
_MIN_CORNERS = 1 << 16


def check_cover(shape: Sequence[int], starts: Rows, sizes: Rows) -> str | None:
    """Return what is wrong with the chunks of one tensor, or None if they tile it.

    A tensor without elements has exactly one chunk, of its whole shape.

    Args:
        shape: of the tensor; each entry, and the number of elements, fits into int64.
        starts: int64[n, d], first index of each chunk.
        sizes: int64[n, d], its extent.
    """
    shapes = np.array([shape], np.int64).reshape(1, len(shape))
    bad = find_uncovered(shapes, np.array([len(starts)], np.int64), starts, sizes)
    return None if bad is None else bad[1]


def find_uncovered(
    shapes: Rows, counts: NDArray[np.int64], starts: Rows, sizes: Rows
) -> tuple[int, str] | None:
    """Return (tensor, problem) for one tensor that its chunks do not tile, or None.

    Args:
        shapes: int64[t, d], one row for each tensor.
        counts: int64[t], how many chunks each tensor has.
        starts: int64[n, d], the chunks of the first tensor, then those of the second, ...
        sizes: int64[n, d].
    """
    if len(shapes) == 0:
        return None
    # Before `reduceat`, which gives the value of its neighbour to a run of no rows.
    if not counts.all():
        return int(np.argmin(counts)), "missing: it has no chunk"
    owner = np.repeat(np.arange(len(shapes)), counts)
    whole = shapes[owner]
    # `whole - starts` may wrap only where `starts < 0` has already condemned the row.
    outside = ((starts < 0) | (sizes < 0) | (starts > whole) | (sizes > whole - starts)).any(axis=1)
    if outside.any():
        row = int(np.argmax(outside))
        tensor = int(owner[row])
        box = f"{starts[row].tolist()} + {sizes[row].tolist()}"
        return tensor, f"out of bounds: chunk {box} in shape {shapes[tensor].tolist()}"
    first = np.cumsum(counts) - counts
    cut = np.logical_or.reduceat(sizes != whole, first, axis=0)
    alone = (counts == 1) & ~cut.any(axis=1)
    wrong = (shapes == 0).any(axis=1) & ~alone
    if wrong.any():
        problem = "overlap: a tensor without elements has one chunk, of its whole shape"
        return int(np.argmax(wrong)), problem
    suspect = ~alone & ~_chained(shapes, first, cut, starts, sizes)
    if not suspect.any():
        return None
    rows = suspect[owner]
    # Dimensions that are cut come first: once they are done, the boxes left over are all equal.
    order = np.argsort(~cut, axis=1, kind="stable")
    turned = order[owner[rows]]
    bad = _uncancelled(
        np.take_along_axis(shapes, order, axis=1),
        owner[rows],
        np.take_along_axis(starts[rows], turned, axis=1),
        np.take_along_axis(sizes[rows], turned, axis=1),
    )
    if bad is None:
        return None
    tensor, problem = bad
    return tensor, problem or _describe(shapes[tensor], sizes[owner == tensor])


def _chained(
    shapes: Rows, first: NDArray[np.int64], cut: NDArray[np.bool_], starts: Rows, sizes: Rows
) -> NDArray[np.bool_]:
    """Which tensors are cut in one dimension only, into chunks that lie end to end, in order."""
    # There is no dimension to chain along: a second chunk of a scalar is found by its corners.
    if shapes.shape[1] == 0:
        return np.zeros(len(shapes), np.bool_)
    dim = cut.argmax(axis=1)
    counts = np.diff(first, append=len(starts))
    column = np.repeat(dim, counts)[:, None]
    begin = np.take_along_axis(starts, column, axis=1)[:, 0]
    extent = np.take_along_axis(sizes, column, axis=1)[:, 0]
    end = begin + extent
    expected = np.empty_like(begin)
    expected[1:] = end[:-1]
    expected[first] = 0
    # A chunk of no element would fit between any two, and rule 5 of the format has none.
    good = np.logical_and.reduceat((begin == expected) & (extent > 0), first)
    last = end[first + counts - 1] == shapes[np.arange(len(shapes)), dim]
    result: NDArray[np.bool_] = good & last & (cut.sum(axis=1) == 1)
    return result


def _uncancelled(
    shapes: Rows, owner: NDArray[np.intp], starts: Rows, sizes: Rows
) -> tuple[int, str] | None:
    """Return a tensor whose corners do not cancel, with a problem where the search was given up."""
    # An empty box has no element to cover and its corners cancel by themselves: it is never right.
    empty = (sizes == 0).any(axis=1)
    if empty.any():
        return int(owner[np.argmax(empty)]), "overlap: a chunk has no element"
    tensors = np.unique(owner)
    tensor = np.concatenate([owner, tensors])
    low = np.concatenate([starts, np.zeros((len(tensors), shapes.shape[1]), np.int64)])
    high = np.concatenate([starts + sizes, shapes[tensors]])
    rest = _suffix_ids(low, high)
    # A term is a corner fixed in the dimensions done, times the box `row` in those to come.
    row = np.arange(len(tensor))
    sign = np.concatenate([np.ones(len(owner), np.int64), np.full(len(tensors), -1, np.int64)])
    point = tensor.astype(np.int64)
    # What format-v1, section 5, lets a reader give up at: cuts in up to six dimensions stay below.
    limit = max(_MIN_CORNERS, _MAX_CORNERS_PER_BOX * len(tensor))
    row, sign, point = _cancel(row, sign, point, rest[0][row])
    for dim in range(shapes.shape[1]):
        if len(row) == 0:
            return None
        # Asked before they are made, since each dimension may double them.
        if 2 * len(row) > limit:
            problem = "overlap or missing: it is cut in too many dimensions to be checked"
            return int(np.bincount(tensor[row]).argmax()), problem
        edge = np.concatenate([low[row, dim], high[row, dim]])
        row = np.concatenate([row, row])
        sign = np.concatenate([sign, -sign])
        point = _ids(np.concatenate([point, point]), edge)
        row, sign, point = _cancel(row, sign, point, rest[dim + 1][row])
    return None if len(row) == 0 else (int(tensor[row[0]]), "")


def _cancel(
    row: NDArray[np.intp], sign: NDArray[np.int64], point: NDArray[np.int64], rest: Rows
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Add up the terms at equal points with equal boxes to come; drop those that vanish."""
    key = _ids(point, rest)
    order = np.argsort(key, kind="stable")
    # Numbers begin at 0, so that the first of all heads a group as well.
    heads = np.flatnonzero(np.diff(key[order], prepend=-1))
    total = np.add.reduceat(sign[order], heads)
    alive = order[heads[total != 0]]
    return row[alive], total[total != 0], point[alive]


def _suffix_ids(low: Rows, high: Rows) -> list[NDArray[np.int64]]:
    """For each dimension, a number for each row that says which box it is from there on."""
    ids = [np.zeros(len(low), np.int64)]
    for dim in range(low.shape[1] - 1, -1, -1):
        ids.append(_ids(_ids(low[:, dim], high[:, dim]), ids[-1]))
    return ids[::-1]


def _ids(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the distinct pairs from 0 on."""
    # Ranks are less than the number of rows, so the product of two stays far below 2**63.
    a = np.unique(first, return_inverse=True)[1]
    b = np.unique(second, return_inverse=True)[1]
    pair = a.astype(np.int64) * (int(b.max(initial=0)) + 1) + b
    ids: NDArray[np.int64] = np.unique(pair, return_inverse=True)[1].astype(np.int64)
    return ids


def _describe(shape: NDArray[np.int64], sizes: Rows) -> str:
    whole = math.prod(shape.tolist())
    # Python integers: the volumes of bad boxes may add up to more than int64 holds.
    held = sum(math.prod(size) for size in sizes.tolist())
    kind = "overlap" if held > whole else "missing" if held < whole else "overlap and missing"
    return f"{kind}: its {len(sizes)} chunks hold {held} elements, the tensor has {whole}"


# What a checkpoint holds, and where.


@decodable
class TensorEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: part and name, torch dtype without "torch.", global shape in elements."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@decodable
class Held(msgspec.Struct, frozen=True, array_like=True):
    """A box of a tensor that a rank holds, as it travels to the coordinator.

    Attributes:
        part: the part of the state.
        name: the tensor.
        dtype: as the format writes it.
        shape: of the global tensor.
        offsets: where the box starts in it.
        sizes: of the box.
        unequal: other ranks may hold other values under this name, and the lowest rank's count
            (the buffers of a DDP model, which its next forward broadcasts from there).
        tie: the first tensor of the part that is the very same memory here; empty without one.
    """

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    unequal: bool = False
    tie: str = ""

    @property
    def box(self) -> Box:
        """The box, in elements of the global tensor."""
        return Box(self.offsets, self.sizes)

    @property
    def tensor(self) -> TensorEntry:
        """The global tensor that the box is of."""
        return TensorEntry(self.part, self.name, self.dtype, self.shape)


@decodable
class ObjectEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The encoded Python values of one part.

    Attributes:
        part: which part.
        rank: whose values they are; None where all ranks share them.
        file: position in `Index.files`.
        offset: absolute byte offset in that file.
        nbytes: how many bytes they take.
        digest: of those bytes, 16 hex digits.
    """

    part: str
    rank: int | None
    file: int
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTable:
    """All chunks, one row each, sorted by tensor.

    Attributes:
        tensor: uint32[n], position in `Index.tensors`.
        file: uint32[n], position in `Index.files`.
        offset: uint64[n], absolute byte offset of the chunk in its file.
        boxes: flat int64, for each chunk `d` starts, then `d` sizes, `d` being that of its tensor.
    """

    tensor: NDArray[np.uint32]
    file: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    boxes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows:
    """The chunks of one tensor: views, not copies, of the columns.

    Attributes:
        file: uint32[n], position in `Index.files`.
        offset: uint64[n], absolute byte offset in the file.
        starts: int64[n, d], first index of the box.
        sizes: int64[n, d], extent of the box.
    """

    file: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """The whole description of one checkpoint's bytes.

    An index made by hand is whatever it was made of; what reads or writes one lets only a valid
    one pass.
    """

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    objects: tuple[ObjectEntry, ...]
    chunks: ChunkTable
    _rows: NDArray[np.int64] = field(init=False, repr=False)
    _values: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.tensors)
        # Rests on the chunks being sorted by tensor, which every decoder has checked.
        rows = np.searchsorted(self.chunks.tensor, np.arange(count + 1)).astype(np.int64)
        ndim = np.array([len(tensor.shape) for tensor in self.tensors], np.int64)
        values = np.zeros(count + 1, np.int64)
        np.cumsum(np.diff(rows) * ndim * 2, out=values[1:])
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_values", values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        mine, theirs = self.chunks, other.chunks
        return (self.files, self.tensors, self.objects) == (
            other.files,
            other.tensors,
            other.objects,
        ) and all(
            np.array_equal(a, b)
            for a, b in (
                (mine.tensor, theirs.tensor),
                (mine.file, theirs.file),
                (mine.offset, theirs.offset),
                (mine.boxes, theirs.boxes),
            )
        )

    def chunks_of(self, tensor_no: int) -> ChunkRows:
        """Return the chunks of tensor number `tensor_no`, in the order stored."""
        rows = slice(int(self._rows[tensor_no]), int(self._rows[tensor_no + 1]))
        values = slice(int(self._values[tensor_no]), int(self._values[tensor_no + 1]))
        ndim = len(self.tensors[tensor_no].shape)
        boxes = self.chunks.boxes[values].reshape(rows.stop - rows.start, 2, ndim)
        table = self.chunks
        return ChunkRows(table.file[rows], table.offset[rows], boxes[:, 0], boxes[:, 1])

    def rows_of(self, tensors: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each tensor number, its first row in `chunks` and the one behind its last."""
        return self._rows[tensors], self._rows[tensors + 1]

    def boxes(
        self, rows: NDArray[np.int64], ndim: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return int64[n, ndim] starts and sizes of the chunks in `rows`, all of `ndim` dims."""
        tensor = self.chunks.tensor[rows]
        place = self._values[tensor] + (rows - self._rows[tensor]) * (2 * ndim)
        flat = self.chunks.boxes[place[:, None] + np.arange(2 * ndim)]
        return flat[:, :ndim], flat[:, ndim:]

    @classmethod
    def build(
        cls,
        files: Sequence[FileEntry],
        tensors: Sequence[TensorEntry],
        objects: Sequence[ObjectEntry],
        rows: Iterable[tuple[int, int, int, Box]],
    ) -> Index:
        """Make an index from chunks in any order.

        Args:
            files: every file of the attempt but the index itself.
            tensors: every tensor of every part.
            objects: the encoded Python values of each part.
            rows: for each chunk, tensor number, file number, byte offset in the file, box.

        Raises:
            UsageError: a row names a tensor that does not exist, has a box of another number of
                dimensions than its tensor, or a number that its column cannot hold.
        """
        # By tensor, as the format demands, and by starts, as it asks of writers; no reader may rely
        # on the second.
        ordered = sorted(rows, key=lambda row: (row[0], row[3].offsets))
        flat: list[int] = []
        for number, _, _, box in ordered:
            # A negative number would be a place counted from the end.
            if not 0 <= number < len(tensors):
                raise UsageError(f"a chunk names tensor {number}, there are {len(tensors)}")
            ndim = len(tensors[number].shape)
            if not len(box.offsets) == len(box.sizes) == ndim:
                raise UsageError(f"{box} of the {ndim}-dim tensor {tensors[number].name!r}")
            flat += box.offsets
            flat += box.sizes
        try:
            chunks = ChunkTable(
                np.array([row[0] for row in ordered], np.uint32),
                np.array([row[1] for row in ordered], np.uint32),
                np.array([row[2] for row in ordered], np.uint64),
                np.array(flat, np.int64),
            )
        except OverflowError as error:
            raise UsageError(f"a chunk has a number that no index can hold: {error}") from error
        return cls(tuple(files), tuple(tensors), tuple(objects), chunks)


def check_tensors(tensors: Sequence[TensorEntry]) -> None:
    """Check names, types and shapes of tensors.

    Raises:
        IntegrityError: one cannot be, or two of one part have the same name.
    """
    if len({(tensor.part, tensor.name) for tensor in tensors}) != len(tensors):
        raise bad_index("two tensors of one part have the same name")
    for tensor in tensors:
        where = f"tensor {tensor.name!r} of part {tensor.part!r}"
        if not is_part(tensor.part) or tensor.name == "__metadata__":
            raise bad_index(f"{where} has a name that cannot be")
        # The list is closed: a type that is not in it asks for another version of the format.
        if tensor.dtype not in DTYPES:
            raise bad_index(f"{where} has the unknown dtype {tensor.dtype!r}")
        try:
            elements = count_elements(tensor.shape)
        except ValueError as error:
            raise bad_index(f"{where} has an impossible shape: {error}") from error
        # In Python integers: from here on, no product of sizes that lie inside can overflow int64.
        if elements * DTYPES[tensor.dtype][1] > INT64_MAX:
            raise bad_index(f"{where} claims more than 2**63 bytes")
