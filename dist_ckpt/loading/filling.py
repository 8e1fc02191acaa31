"""From bytes of files to elements of tensors: what is wanted of a checkpoint, and where it goes.

All files of a checkpoint are thought of as lying in one row, each from a multiple of `unit_bytes`
on and never touching the one before it. A place in this row is an *address*: then a range is two
numbers, and what is true of neighbours in one file needs no look at which file it is. Reads are
made of *units*: blocks with a digest, or, unverified, runs of `unit_bytes`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format.files import BLOCK_BYTES, DTYPES
from dist_ckpt.format.index import Box, Index, element_span, intersect, run_boxes, volume
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.staging.arena import reach, view_box
from dist_ckpt.state.layout import note_written

Column = NDArray[np.int64]

SECTOR_BYTES = 4096
"""A disk reads whole ones of these, to memory that begins at a multiple of it."""

_ADDRESS_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Ranges of addresses, one row each: `start` up to, not including, `stop`.

    Attributes:
        start: int64[n].
        stop: int64[n].
    """

    start: Column
    stop: Column

    def __len__(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        """How many bytes the ranges hold, those of several counted several times."""
        return int((self.stop - self.start).sum())

    def pairs(self) -> list[tuple[int, int]]:
        """Return the rows as Python numbers."""
        return list(zip(self.start.tolist(), self.stop.tolist(), strict=True))


class Files:
    """The row of all files of a checkpoint.

    Args:
        sizes: bytes of each file, by its number.
        unit_bytes: what reads are made of where there are no blocks: sectors, or single bytes.
        apart_bytes: how many addresses lie between two files: as gaps have that are bridged.
        blocks: where those of each file begin and end, from 0 to its size; None: not known.

    Raises:
        UsageError: a size or the unit is out of range, or there are more bytes than addresses.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        unit_bytes: int,
        apart_bytes: int = 0,
        blocks: Sequence[Column | None] | None = None,
    ) -> None:
        if unit_bytes < 1 or apart_bytes < 0 or any(size < 0 for size in sizes):
            raise UsageError(f"bad sizes: unit_bytes={unit_bytes}, files of {min(sizes)} bytes")
        # In Python integers: what an index claims may be more than int64 holds.
        apart = 1 + -(-apart_bytes // unit_bytes)
        if sum(sizes) + (1 + apart) * unit_bytes * (len(sizes) + 1) > _ADDRESS_LIMIT:
            raise UsageError(f"{len(sizes)} files claim more bytes than a load can address")
        self._unit_bytes = unit_bytes
        self._sizes = np.array(sizes, np.int64)
        # More units than it has, so that the end of a file never touches the next one, and no read
        # that goes on over a gap leaves its file.
        units = -(-self._sizes // unit_bytes) + apart
        self._base = np.concatenate([[0], np.cumsum(units * unit_bytes)]).astype(np.int64)
        self._edges: Column | None = None
        if blocks is not None:
            edges = [self._base[n] + each for n, each in enumerate(blocks) if each is not None]
            self._edges = np.concatenate([np.zeros(0, np.int64), *edges])

    @classmethod
    def of(cls, index: Index, *, apart_bytes: int, verify: bool) -> Files:
        """Return the row of the files of `index`, which has the digests of what is verified."""
        # What is not verified is read by sectors, so that it can go past the page cache too.
        blocks = [file.edges if file.digest else None for file in index.files] if verify else None
        sizes = [file.nbytes for file in index.files]
        return cls(sizes, unit_bytes=SECTOR_BYTES, apart_bytes=apart_bytes, blocks=blocks)

    @property
    def largest_unit(self) -> int:
        """The most bytes of a unit."""
        return self._unit_bytes if self._edges is None else BLOCK_BYTES

    def size(self, file: int) -> int:
        """Return the bytes of file number `file`."""
        return int(self._sizes[file])

    def address(self, file: NDArray[np.integer], offset: Column) -> Column:
        """Return the addresses of the bytes at `offset` of the files of numbers `file`."""
        result: Column = self._base[file] + offset
        return result

    def place(self, address: int) -> tuple[int, int]:
        """Return the number of the file that holds the byte at `address`, and its offset there."""
        file = int(np.searchsorted(self._base, address, side="right")) - 1
        return file, address - int(self._base[file])

    def widen(self, ranges: Ranges) -> Ranges:
        """Widen each range to whole units, the last of a file being as short as the file ends.

        None of `ranges` is empty or leaves its file.
        """
        if self._edges is not None:
            stop = self._edges[np.searchsorted(self._edges, ranges.stop)]
            return Ranges(self.begin(ranges.start), stop)
        unit = self._unit_bytes
        file = np.searchsorted(self._base, ranges.start, side="right") - 1
        end = self._base[file] + self._sizes[file]
        return Ranges(self.begin(ranges.start), np.minimum(-(-ranges.stop // unit) * unit, end))

    def begin(self, addresses: Column) -> Column:
        """Return where the unit begins that each address is in."""
        if self._edges is None:
            return addresses // self._unit_bytes * self._unit_bytes
        found: Column = self._edges[np.searchsorted(self._edges, addresses, side="right") - 1]
        return found

    def units(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the units that a run of whole units is made of."""
        found = [(start, start)]
        while (at := found[-1][1]) < stop:
            found += self.widen(Ranges(np.array([at]), np.array([at + 1]))).pairs()
        return found[1:]


def merge_ranges(ranges: Ranges) -> Ranges:
    """Return the same bytes, sorted and each once: what overlaps or touches becomes one range."""
    order = np.argsort(ranges.start, kind="stable")
    start = ranges.start[order]
    reach = np.maximum.accumulate(ranges.stop[order])
    # A range begins a new one where everything before it has ended.
    heads = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]])[: len(start)])
    tails = np.concatenate([heads[1:], [len(start)]])[: len(heads)] - 1
    return Ranges(start[heads], reach[tails])


# Which stored chunks hold wanted boxes, and in which bytes of them. Pure, and near-linear.
#
# Everything is done in columns, for all tensors of one number of dimensions together: a checkpoint
# of a thousand ranks has a million chunks, and a load at one rank wants all of them.


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What wanted boxes and stored chunks have in common, one row for each pair.

    Attributes:
        want: int64[n], number of the wanted box.
        row: int64[n], row of the chunk in `Index.chunks`.
        start: int64[n], byte offset in its file of the first common element.
        stop: int64[n], byte offset behind the last one.
        nbytes: int64[n], of the common elements: `stop - start` only where nothing lies between.
    """

    want: Column
    row: Column
    start: Column
    stop: Column
    nbytes: Column


def find_pieces(
    index: Index, tensors: Sequence[int], boxes: Sequence[Box], *, max_gap_bytes: int
) -> tuple[Pieces, Pieces]:
    """Find where the elements of wanted boxes are stored.

    Args:
        index: the chunk table.
        tensors: for each wanted box, the number of its tensor in `index.tensors`.
        boxes: the wanted boxes; one of no element wants nothing.
        max_gap_bytes: how many unwanted bytes within a chunk may be read along.

    Returns:
        The pieces, from the first to the last common element of each pair; and the runs, which
        are the pieces again, cut wherever more than `max_gap_bytes` of the chunk are not wanted.
    """
    found: list[Pieces] = []
    runs: list[Pieces] = []
    tensor = np.array(tensors, np.int64)
    ndims = np.array([len(box.sizes) for box in boxes], np.int64)
    for ndim in np.unique(ndims).tolist():
        numbers = np.flatnonzero(ndims == ndim)
        offsets = [boxes[number].offsets for number in numbers.tolist()]
        sizes = [boxes[number].sizes for number in numbers.tolist()]
        low = np.array(offsets, np.int64).reshape(len(numbers), ndim)
        high = low + np.array(sizes, np.int64).reshape(len(numbers), ndim)
        want, row = _candidates(index, tensor[numbers], low, high)
        starts, extents = index.boxes(row, ndim)
        common = np.maximum(starts, low[want]), np.minimum(starts + extents, high[want])
        hit = (common[0] < common[1]).all(axis=1)
        inner = common[0][hit] - starts[hit], (common[1] - common[0])[hit]
        pair = numbers[want[hit]], row[hit]
        item = _itemsizes(index)[tensor[pair[0]]]
        pieces, cut = _spans(index, pair, item, extents[hit], inner, max_gap_bytes)
        found.append(pieces)
        runs.append(cut)
    return _concatenate(found), _concatenate(runs)


def _candidates(index: Index, tensor: Column, low: Column, high: Column) -> tuple[Column, Column]:
    """Pair each wanted box with the chunks that it may have an element in common with."""
    first, stop = index.rows_of(tensor)
    wanted = np.bincount(tensor, minlength=len(index.tensors))[tensor] if len(tensor) else tensor
    alone = np.flatnonzero(wanted == 1)
    pairs = [_expand(alone, first[alone], stop[alone])]
    # One box of a tensor is compared with all its chunks; several look theirs up, not to compare
    # all with all.
    several = np.flatnonzero(wanted > 1)
    order = several[np.argsort(tensor[several], kind="stable")]
    heads = np.flatnonzero(np.diff(tensor[order], prepend=-1))
    for group in np.split(order, heads[1:]) if len(order) else []:
        row = np.arange(first[group[0]], stop[group[0]])
        starts, extents = index.boxes(row, low.shape[1])
        want, near = _look_up(starts, starts + extents, low[group], high[group])
        pairs.append((group[want], row[near]))
    want = np.concatenate([pair[0] for pair in pairs])
    return want, np.concatenate([pair[1] for pair in pairs])


def _look_up(starts: Column, stops: Column, low: Column, high: Column) -> tuple[Column, Column]:
    """Return the pairs (box, chunk) that overlap in the dimension which tells them apart best."""
    count, ndim = low.shape
    if ndim == 0:
        return np.arange(count), np.zeros(count, np.int64)
    orders, begins, ends = [], [], []
    for dim in range(ndim):
        order = np.argsort(starts[:, dim], kind="stable")
        # Of chunks in the order of their starts, those before `begin` have all ended by `low`.
        reach = np.maximum.accumulate(stops[order, dim])
        begin = np.searchsorted(reach, low[:, dim], side="right")
        end = np.searchsorted(starts[order, dim], high[:, dim], side="left")
        orders.append(order)
        begins.append(begin)
        ends.append(np.maximum(end, begin))
    best = np.argmin(np.stack(ends) - np.stack(begins), axis=0)
    wants, rows = [], []
    for dim in range(ndim):
        mine = np.flatnonzero(best == dim)
        want, place = _expand(mine, begins[dim][mine], ends[dim][mine])
        wants.append(want)
        rows.append(orders[dim][place])
    return np.concatenate(wants), np.concatenate(rows)


def _expand(number: Column, first: Column, stop: Column) -> tuple[Column, Column]:
    """Pair each `number` with every value from its `first` up to its `stop`."""
    counts = stop - first
    owner = np.repeat(np.arange(len(number)), counts)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number[owner], first[owner] + step


def _spans(
    index: Index,
    pair: tuple[Column, Column],
    item: Column,
    extents: Column,
    inner: tuple[Column, Column],
    max_gap_bytes: int,
) -> tuple[Pieces, Pieces]:
    """Return the bytes of each pair, and the same cut into runs.

    Args:
        index: the chunk table.
        pair: wanted box and chunk.
        item: bytes for each element.
        extents: of the chunks.
        inner: where in its chunk the common box starts, and its sizes.
        max_gap_bytes: see `find_pieces`.
    """
    want, row = pair
    relative, sizes = inner
    stride, span = _strides(extents, sizes)
    base = index.chunks.offset[row].astype(np.int64)
    start = base + (relative * stride).sum(axis=1) * item
    # What lies between two elements is in the span, and in no count of bytes that are wanted.
    nbytes = item.copy()
    for dim in range(sizes.shape[1]):  # by columns: a reduction of short rows costs many times that
        nbytes *= sizes[:, dim]
    pieces = Pieces(want, row, start, start + span[:, 0] * item, nbytes)
    # Between two neighbours in a dimension lie a stride's elements, less what the first one spans.
    gap = np.where(sizes > 1, (stride - span[:, 1:]) * item[:, None], 0)
    wide = np.flatnonzero((gap > max_gap_bytes).any(axis=1))
    if not len(wide):
        return pieces, pieces
    dense = np.ones(len(want), np.bool_)
    dense[wide] = False
    runs = [Pieces(want[dense], row[dense], start[dense], pieces.stop[dense], nbytes[dense])]
    for at in wide.tolist():
        # A gap is never narrower than those of the dimensions inside its own.
        depth = int(np.flatnonzero(gap[at] > max_gap_bytes)[-1]) + 1
        places = np.zeros(1, np.int64)
        for dim in range(depth):
            places = (places[:, None] + np.arange(sizes[at, dim]) * stride[at, dim]).reshape(-1)
        first = start[at] + places * item[at]
        filled = np.full(len(first), want[at]), np.full(len(first), row[at])
        stop = first + span[at, depth] * item[at]
        runs.append(Pieces(*filled, first, stop, np.full(len(first), nbytes[at] // len(first))))
    return pieces, _concatenate(runs)


def _strides(extents: Column, sizes: Column) -> tuple[Column, Column]:
    """Return int64[n, d] strides of chunks, and int64[n, d + 1] what the boxes in them span.

    Column `j` of the second is how many elements lie from the first to the last one of a box that
    is cut down to a single index in each of the first `j` dimensions.
    """
    count, ndim = extents.shape
    stride = np.ones((count, ndim), np.int64)
    span = np.ones((count, ndim + 1), np.int64)
    for dim in range(ndim - 1, -1, -1):
        if dim < ndim - 1:
            stride[:, dim] = stride[:, dim + 1] * extents[:, dim + 1]
        span[:, dim] = (sizes[:, dim] - 1) * stride[:, dim] + span[:, dim + 1]
    return stride, span


def _itemsizes(index: Index) -> Column:
    return np.array([DTYPES[tensor.dtype][1] for tensor in index.tensors], np.int64)


def _concatenate(many: Sequence[Pieces]) -> Pieces:
    if len(many) == 1:
        return many[0]
    empty = np.zeros(0, np.int64)
    return Pieces(
        np.concatenate([empty, *(each.want for each in many)]),
        np.concatenate([empty, *(each.row for each in many)]),
        np.concatenate([empty, *(each.start for each in many)]),
        np.concatenate([empty, *(each.stop for each in many)]),
        np.concatenate([empty, *(each.nbytes for each in many)]),
    )


# What is wanted, and the memory that it goes to.


STRAIGHT_BYTES = 64 << 10
"""Fewer bytes than this are copied sooner than they are listed for a read of several places."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of one stored tensor, and the memory of this rank that its values go to.

    The names in `local.held` are those of the state: a rename may have parted them from the stored
    ones, so a reader goes by `tensor` alone.

    Attributes:
        tensor: the number of the stored tensor in `Index.tensors`.
        local: the box in elements of the global tensor, and the memory for it, of its shape.
        dtype: that of the stored tensor. Where the memory has another one, the values are cast:
            `memory.copy_(values of the stored dtype)`.
    """

    tensor: int
    local: LocalBox
    dtype: torch.dtype


def boxes_of(wanted: Iterable[Wanted]) -> list[tuple[int, Box]]:
    """Return the wanted boxes as `Source.index_of` takes them."""
    return [(each.tensor, each.local.held.box) for each in wanted]


@dataclass(frozen=True, slots=True)
class ReadTarget:
    """Where one stretch of the bytes of a read goes.

    Attributes:
        address: of its first byte.
        view: what it is read to, as long as the stretch.
        piece: the number of the piece whose place that is already; None where it is not.
    """

    address: int
    view: memoryview
    piece: int | None = None

    @property
    def straight(self) -> bool:
        """Whether the view is the place that the bytes go to."""
        return self.piece is not None


class ReadTargets:
    """What one rank wants, planned: which bytes it needs, and what becomes of them.

    Bytes may come in any order, from several threads, in ranges that are cut anywhere.

    Args:
        index: the chunk table.
        wanted: boxes and their memory; the index has the tensors with these shapes and dtypes.
        files: gives the addresses.
        max_gap_bytes: how many bytes of a chunk that nobody wants may be read along.

    Attributes:
        needs: the ranges of addresses to be given to `fill`, whole units, sorted and disjoint.
        nbytes_wanted: bytes of the boxes.

    Raises:
        IntegrityError: the chunks do not hold every wanted element exactly once.
    """

    def __init__(
        self, index: Index, wanted: Sequence[Wanted], files: Files, *, max_gap_bytes: int
    ) -> None:
        self._index = index
        self._wanted = wanted
        boxes = [each.local.held.box for each in wanted]
        nbytes = [
            volume(box) * each.dtype.itemsize for box, each in zip(boxes, wanted, strict=True)
        ]
        self.nbytes_wanted = sum(nbytes)
        pieces, runs = find_pieces(
            index, [each.tensor for each in wanted], boxes, max_gap_bytes=max_gap_bytes
        )
        file = index.chunks.file
        self.needs = merge_ranges(
            files.widen(
                Ranges(
                    files.address(file[runs.row], runs.start),
                    files.address(file[runs.row], runs.stop),
                )
            )
        )
        start = files.address(file[pieces.row], pieces.start)
        order = np.argsort(start, kind="stable")
        self._start = start[order]
        self._stop = files.address(file[pieces.row], pieces.stop)[order]
        self._reach = np.maximum.accumulate(self._stop)
        self._want = pieces.want[order]
        self._row = pieces.row[order]
        piece_bytes = pieces.nbytes[order]
        # Nothing lies between two elements of such a piece, and they come in its own order. Its
        # length alone says nothing: elements and gaps may add up to the bytes of any box.
        self._dense = self._stop - self._start == piece_bytes
        self._whole = self._dense & (piece_bytes == np.array(nbytes, np.int64)[self._want])
        # Bytes of each piece that have not come to their place yet.
        self._missing = piece_bytes.copy()
        # Before a byte is read: chunks that leave holes must not cost the state its old values.
        self._check_planned(nbytes)
        self._halves: dict[int, _Half] = {}
        # The memory of pieces that come in several reads, where it is one run of bytes.
        self._flat: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()
        for each in wanted:
            # Before the first byte, so that whatever becomes of the read is counted.
            note_written(each.local.memory)

    def land(self, start: int, bounce: memoryview) -> list[ReadTarget]:
        """Find memory to read a range to: that of the targets where that is possible.

        Args:
            start: the address of the range, which is as long as `bounce`.
            bounce: memory for what cannot be read to its place.

        Returns:
            Stretches of the range, one after another: each to be given to `settle` when its bytes
            are there.
        """
        stop, done = start + len(bounce), start
        landings = []
        for number in self._pieces_in(start, stop):
            begin = int(self._start[number])
            low, high = max(begin, start), min(int(self._stop[number]), stop)
            if high - low < STRAIGHT_BYTES or not self._straight[number]:
                continue
            run = self._run(number, part=high - low)
            if run is not None:
                if done < low:
                    landings.append(ReadTarget(done, bounce[done - start : low - start]))
                landings.append(ReadTarget(low, run[low - begin : high - begin].data, number))
                done = high
        if done < stop:
            landings.append(ReadTarget(done, bounce[done - start :]))
        return landings

    def settle(self, landing: ReadTarget) -> None:
        """Bring what was read to `landing.view` to its place."""
        if landing.piece is None:
            self.fill(landing.address, landing.view)
        else:
            self._count([landing.piece], [len(landing.view)])

    def fill(self, start: int, data: memoryview) -> None:
        """Copy out of `data`, which lies at the address `start`, all that is wanted of it."""
        numbers = self._pieces_in(start, start + len(data))
        self._count(numbers, [self._copy(number, start, data) for number in numbers])

    def check_filled(self) -> None:
        """Check that as many bytes as are wanted came to their places: none is missing or twice.

        Raises:
            IntegrityError: a tensor is not what is stored; names it. No damage of the checkpoint
                can lead here, only an error in reading it.
        """
        wrong = np.flatnonzero(self._missing)
        if len(wrong):
            number = int(wrong[0])
            self._refuse(int(self._want[number]), f"{int(self._missing[number])} bytes are left")

    def names_in(self, start: int, stop: int) -> list[str]:
        """Return the stored `part/name` of wanted tensors with bytes in a range of addresses."""
        tensors = [
            self._index.tensors[self._wanted[int(self._want[number])].tensor]
            for number in self._pieces_in(start, stop)
        ]
        return list(dict.fromkeys(f"{each.part}/{each.name}" for each in tensors))

    def _check_planned(self, nbytes: Sequence[int]) -> None:
        """Check that the pieces of each wanted box hold as many bytes as it has."""
        planned = np.zeros(len(nbytes), np.int64)
        # `planned[want] += ...` would count one piece of each box.
        np.add.at(planned, self._want, self._missing)
        wrong = np.flatnonzero(planned != np.array(nbytes, np.int64))
        if len(wrong):
            want = int(wrong[0])
            self._refuse(want, f"{int(planned[want])} of {nbytes[want]} bytes are in its chunks")

    def _refuse(self, want: int, problem: str) -> NoReturn:
        tensor, held = self._index.tensors[self._wanted[want].tensor], self._wanted[want].local.held
        raise IntegrityError(
            f"{tensor.part}/{tensor.name}, elements {list(held.offsets)} to "
            f"{[a + n for a, n in zip(held.offsets, held.sizes, strict=True)]}: {problem} after "
            "each wanted byte should have come to its place once; do not use what was loaded",
            kind=ErrorKind.COVERAGE,
        )

    def _count(self, numbers: list[int], nbytes: list[int]) -> None:
        """Note how many bytes of these pieces, each named once, came to their places."""
        if numbers:
            with self._lock:
                self._missing[numbers] -= nbytes

    @property
    def devices(self) -> list[torch.device]:
        """The devices with memory that something goes to."""
        return list(dict.fromkeys(each.local.memory.device for each in self._wanted))

    @cached_property
    def _straight(self) -> NDArray[np.bool_]:
        """What may be read straight to its place.

        Bytes that have no second place, to memory that no other bytes go to: else one would be
        compared while the other is written over it.
        """
        memory = np.array([_extent(each.local.memory) for each in self._wanted], np.int64)
        start, stop = memory.reshape(-1, 2).T
        return _are_apart(self._start, self._stop) & _are_apart(start, stop)[self._want]

    def _run(self, number: int, *, part: int) -> NDArray[np.uint8] | None:
        """Return the memory of piece `number` if it is one run of bytes, just as it is stored.

        Args:
            number: the piece.
            part: how many bytes of it are wanted now: if it is not all, it is asked for again.
        """
        flat = self._flat.get(number)
        if flat is not None:
            return flat
        if not self._dense[number]:
            return None
        want = self._wanted[int(self._want[number])]
        whole = self._whole[number]
        target = want.local.memory if whole else self._target(number)[2]
        if not _is_plain(target, want.dtype):
            return None
        flat = _flat(target)
        if part < len(flat):
            self._flat[number] = flat
        return flat

    def _target(self, number: int) -> tuple[Box, Box, torch.Tensor]:
        """Return the chunk that piece `number` is of, what of it is wanted, and the memory."""
        local = self._wanted[int(self._want[number])].local
        chunk = self._chunk(int(self._row[number]), len(local.held.shape))
        common = intersect(chunk, local.held.box)
        assert common is not None  # this is what a piece is
        return chunk, common, view_box(local.memory, common, origin=local.held.offsets)

    def _pieces_in(self, start: int, stop: int) -> list[int]:
        # Before `first` every piece has ended, from `last` on none has begun.
        first = int(np.searchsorted(self._reach, start, side="right"))
        last = int(np.searchsorted(self._start, stop, side="left"))
        return (first + np.flatnonzero(self._stop[first:last] > start)).tolist()

    def _copy(self, number: int, at: int, data: memoryview) -> int:
        """Copy what `data`, at the address `at`, holds of piece `number`; return the bytes."""
        begin, end = int(self._start[number]), int(self._stop[number])
        low, high = max(begin, at), min(end, at + len(data))
        source = data[low - at : high - at]
        run = self._run(number, part=high - low)
        if run is None:
            return self._copy_elements(number, low, source)
        # The common case: numpy lets the other threads run.
        np.copyto(run[low - begin : high - begin], np.frombuffer(source, np.uint8))
        return len(source)

    def _copy_elements(self, number: int, low: int, source: memoryview) -> int:
        """Copy what `source`, at the address `low`, holds of piece `number`, one by one.

        Returns:
            How many bytes of the piece that were, those between its elements not counted.
        """
        chunk, common, target = self._target(number)
        dtype = self._wanted[int(self._want[number])].dtype
        item, done = dtype.itemsize, low - int(self._start[number])
        first, _ = element_span(chunk, common)
        raw = torch.frombuffer(source, dtype=torch.uint8)
        if done % item == 0 and len(source) % item == 0:
            # Files of other programs have elements at any byte, and a processor may refuse to load
            # one from an address that its size does not divide: complex128 ends the process.
            run = (raw if raw.data_ptr() % item == 0 else raw.clone()).view(dtype)
            return item * _copy_run(target, run, chunk, common, first + done // item)
        # Files of other programs have elements anywhere, so a read may end inside of one: it is
        # put together of bytes, in memory of the stored dtype.
        half = self._half(number, target, dtype, common)
        outer, inner = _in_bytes(chunk, item), _in_bytes(common, item)
        nbytes = _copy_run(_as_bytes(half.memory), raw, outer, inner, first * item + done)
        self._add(number, target, half, nbytes)
        return nbytes

    def _chunk(self, row: int, ndim: int) -> Box:
        starts, sizes = self._index.boxes(np.array([row]), ndim)
        return Box(tuple(starts[0].tolist()), tuple(sizes[0].tolist()))

    def _half(self, number: int, target: torch.Tensor, dtype: torch.dtype, box: Box) -> _Half:
        with self._lock:
            found = self._halves.get(number)
            if found is None:
                same = target.dtype == dtype and not _is_lazy(target)
                memory = target if same else torch.empty(box.sizes, dtype=dtype)
                found = _Half(memory, volume(box) * dtype.itemsize)
                self._halves[number] = found
            return found

    def _add(self, number: int, target: torch.Tensor, half: _Half, nbytes: int) -> None:
        with self._lock:
            half.missing_bytes -= nbytes
            if half.missing_bytes:
                return
            # Only who brings the last part goes on, and copies the whole.
            del self._halves[number]
        if half.memory is not target:
            _assign(target, half.memory)


def _extent(memory: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor, and that behind its last one."""
    # Nothing is read straight to a device, so where its memory lies is of no matter.
    if not memory.numel() or memory.device.type != "cpu":
        return 0, 0
    start = memory.data_ptr()
    return start, start + reach(memory) * memory.itemsize


def _are_apart(start: Column, stop: Column) -> NDArray[np.bool_]:
    """Tell of each range whether it has nothing in common with any other one."""
    order = np.argsort(start, kind="stable")
    first, last = start[order], stop[order]
    reach = np.maximum.accumulate(last)
    apart = np.ones(len(order), np.bool_)
    apart[1:] &= first[1:] >= reach[:-1]
    apart[:-1] &= last[:-1] <= first[1:]
    found = np.empty(len(order), np.bool_)
    found[order] = apart
    return found


@dataclass(slots=True)
class _Half:
    """A piece that comes in parts which end inside of elements."""

    memory: torch.Tensor
    missing_bytes: int


def _copy_run(target: torch.Tensor, run: torch.Tensor, chunk: Box, common: Box, first: int) -> int:
    """Copy a run of elements of `chunk` into `target`, which is for `common`; return how many.

    Args:
        target: memory of the sizes of `common`.
        run: the elements of `chunk` from its element number `first` on.
        chunk: a stored box.
        common: a box inside it: other elements of the run are stepped over.
        first: counted in the C order of `chunk`.
    """
    # With the strides of the stored chunk, whatever of it the run holds.
    strides = [math.prod(chunk.sizes[dim + 1 :]) for dim in range(len(chunk.sizes))]
    count = 0
    for box in run_boxes(chunk, first, first + len(run)):
        part = intersect(box, common)
        if part is not None:
            offset = element_span(chunk, part)[0] - first
            source = run.as_strided(part.sizes, strides, offset)
            _assign(view_box(target, part, origin=common.offsets), source)
            count += volume(part)
    return count


def _assign(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        # Out of pinned memory this goes on behind our back: whoever owns the memory waits.
        target.copy_(source, non_blocking=True)


def _flat(target: torch.Tensor) -> NDArray[np.uint8]:
    # By numbers: `view` asks for the stride of a single element, which means nothing.
    return target.as_strided((target.numel(),), (1,)).view(torch.uint8).numpy()


def _is_plain(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of `target` lie in memory as they are stored."""
    if _is_lazy(target):
        return False
    return target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()


def _is_lazy(target: torch.Tensor) -> bool:
    """Whether the memory has another value than the tensor: only torch's own copy minds that."""
    return target.is_conj() or target.is_neg()


def _in_bytes(box: Box, item: int) -> Box:
    return Box((*box.offsets, 0), (*box.sizes, item))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(-1).view(torch.uint8)
