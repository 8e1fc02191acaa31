"""Ranges of bytes of many files: which hold what is wanted, and which rank reads them. Pure.

All files of a checkpoint are thought of as lying in one row, each from a multiple of `unit_bytes`
on and never touching the one before it. A place in this row is an *address*: then a range is two
numbers, and what is true of neighbours in one file needs no look at which file it is. Reads are
made of *units*: blocks with a digest, or, unverified, runs of `unit_bytes`.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import UsageError
from dist_ckpt.format.files import BLOCK_BYTES, DTYPES, bytes_digest
from dist_ckpt.format.index import Box, Index

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


def bridge(ranges: Ranges, *, max_gap_bytes: int) -> Ranges:
    """Join neighbours over gaps that cost less than one more request.

    A gap is read along where it has at most `max_gap_bytes`, and at most one byte for each 16 that
    its two neighbours have: so no more than a sixteenth is ever read in vain.

    Args:
        ranges: sorted and disjoint.
        max_gap_bytes: unwanted bytes that cost less than one more request; 0 joins nothing.
    """
    if len(ranges) < 2 or max_gap_bytes < 1:
        return ranges
    gap = ranges.start[1:] - ranges.stop[:-1]
    size = ranges.stop - ranges.start
    apart = (gap > max_gap_bytes) | (16 * gap > np.minimum(size[1:], size[:-1]))
    heads = np.flatnonzero(np.concatenate([[True], apart]))
    tails = np.flatnonzero(np.concatenate([apart, [True]]))
    return Ranges(ranges.start[heads], ranges.stop[tails])


def cut(
    ranges: Ranges, *, most_bytes: int, begin: Callable[[Column], Column] = lambda at: at
) -> Ranges:
    """Cut the ranges at every multiple of `most_bytes`, so that none has more.

    The places do not depend on where a range begins: two ranks that cut what they have in common
    do it at the same places.

    Args:
        ranges: sorted and disjoint.
        most_bytes: where to cut.
        begin: `Files.begin`, to cut where units begin: then a range may have a unit more.
    """
    first, stop = ranges.start // most_bytes, -(-ranges.stop // most_bytes)
    counts = stop - first
    owner = np.repeat(np.arange(len(ranges)), counts)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner]
    edge, next_edge = begin(step * most_bytes), begin((step + 1) * most_bytes)
    # Only what lies inside of a range is sure to be in a unit.
    starts = np.where(step == first[owner], ranges.start[owner], edge)
    stops = np.where(step + 1 == stop[owner], ranges.stop[owner], next_edge)
    some = starts < stops
    return Ranges(np.maximum(starts, ranges.start[owner])[some], stops[some])


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


# Who reads what, when several ranks want the same bytes: the same on every rank.
#
# Ranks with equal needs form a group: the replicas of DDP are one group, HSDP has one for each
# shard. What one rank alone needs it reads by itself, without a word to the others. What several
# need is cut into extents. One rank of those that need an extent reads it and sends it to the
# others, in windows: in each of them a rank holds a bounded number of bytes. Where not every rank
# can read every file, one that can reads also for those that cannot.


PAGE_BYTES = 4096
"""Each extent has pages of a window's memory to itself, where a disk can read into it directly."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of addresses that one rank reads for several.

    Attributes:
        start: the first address.
        stop: the one behind the last.
        reader: the rank that reads it.
        ranks: those that need it, and the reader.
        passes_on: whether the reader itself does not need it.
        tag: tells it from the other extents of its window.
    """

    start: int
    stop: int
    reader: int
    ranks: tuple[int, ...]
    passes_on: bool = False
    tag: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ReadSchedule:
    """The schedule of a load.

    Attributes:
        alone: for each rank, what it reads for itself.
        windows: the extents of each window, in the order of their addresses.
    """

    alone: tuple[Ranges, ...]
    windows: tuple[tuple[Extent, ...], ...]


@decodable
class Survey(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 has to know of the needs of a rank: as much, however many ranges they are.

    Attributes:
        digest: the same for equal needs.
        nbytes: how many bytes they are.
        sample: which of some places all over the files are among them, one bit each, deflated.
    """

    digest: str
    nbytes: int
    sample: bytes


# Of so many places the share that several ranks need is known to about a hundredth.
_SAMPLES = 2048


def survey(needs: Ranges, files: Files, sizes: Sequence[int]) -> Survey:
    """Return what rank 0 is told of needs.

    Args:
        needs: sorted and disjoint.
        files: gives the addresses.
        sizes: bytes of each file, the same on all ranks.
    """
    digest = bytes_digest(needs.start.astype("<i8").tobytes() + needs.stop.astype("<i8").tobytes())
    return Survey(digest, needs.nbytes, zlib.compress(_sampled(needs, files, sizes).tobytes()))


def _sampled(needs: Ranges, files: Files, sizes: Sequence[int]) -> NDArray[np.uint8]:
    """Return which of the sampled bytes are among `needs`, one bit for each."""
    ends = np.cumsum(np.array(sizes, np.int64))
    total = int(ends[-1]) if len(ends) else 0
    count = min(total, _SAMPLES)
    if not len(needs):
        return np.zeros(-(-count // 8), np.uint8)
    step = total // count
    at = step // 2 + step * np.arange(count)
    file = np.searchsorted(ends, at, side="right")
    address = files.address(file, at - np.concatenate([[0], ends])[file])
    row = np.searchsorted(needs.start, address, side="right") - 1
    return np.packbits((row >= 0) & (address < needs.stop[row]))


def cost(surveys: Sequence[Survey]) -> tuple[int, int]:
    """Return the bytes read when each rank reads what it needs, and when each is read once.

    The first is exact. So is the second among ranks that need the same; what those that do not
    have in common is as much as of the sampled bytes.

    Args:
        surveys: of each rank.
    """
    apart = sum(each.nbytes for each in surveys)
    groups = {each.digest: each for each in surveys}.values()
    separate = sum(each.nbytes for each in groups)
    samples = [np.frombuffer(zlib.decompress(each.sample), np.uint8) for each in groups]
    needed = np.unpackbits(np.stack(samples), axis=1).sum(axis=0, dtype=np.int64)
    again, count = int((needed - 1).clip(0).sum()), int(needed.sum())
    return apart, separate - (separate * again // count if count else 0)


def group(surveys: Sequence[Survey]) -> list[int]:
    """Return for each rank the number of its group: of those that need the same."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(each.digest, len(numbers)) for each in surveys]


CanRead = Callable[[int], Sequence[int]]
"""Returns the ranks that can read what is at an address, ascending; all of an extent alike."""


def share(
    needs: Sequence[Ranges],
    group_of: Sequence[int],
    *,
    window_bytes: int,
    can_read: CanRead | None = None,
) -> ReadSchedule:
    """Decide who reads what.

    Each rank reads about the same number of bytes, as far as it needs any that others need too.

    Args:
        needs: of each group, sorted and disjoint, whole units, and cut into what an extent may
            have: at the same places by all that need what lies there.
        group_of: for each rank, the number of its group.
        window_bytes: the most that a rank holds in a window, if an extent is no more.
        can_read: who can read what; None where every rank can read everything.
    """
    members: list[list[int]] = [[] for _ in needs]
    for rank, group in enumerate(group_of):
        members[group].append(rank)
    private: list[list[tuple[int, int]]] = [[] for _ in needs]
    common: list[tuple[int, int, tuple[int, ...]]] = []
    for start, stop, groups in _overlay(needs):
        one = members[groups[0]][0] if len(groups) == 1 and len(members[groups[0]]) == 1 else None
        if one is not None and (can_read is None or one in can_read(start)):
            private[groups[0]].append((start, stop))
        else:
            common.append((start, stop, groups))
    alone = tuple(_ranges(private[group]) for group in group_of)
    readers = _Readers(members, [each.nbytes for each in alone])
    windows = _Windows(len(needs), window_bytes)
    for start, stop, groups in common:
        ranks = tuple(sorted(rank for group in groups for rank in members[group]))
        if can_read is None:
            reader = readers.take(groups, stop - start)
        else:
            able = can_read(start)
            reader = readers.take_of([rank for rank in ranks if rank in able] or able, stop - start)
        if reader not in ranks:
            holders = tuple(sorted((*ranks, reader)))
            extent = Extent(start, stop, reader, holders, passes_on=True)
            windows.add(extent, sorted({*groups, group_of[reader]}))
        else:
            windows.add(Extent(start, stop, reader, ranks), groups)
    return ReadSchedule(alone, tuple(tuple(window) for window in windows.extents))


def place_extents(extents: Sequence[Extent]) -> list[int]:
    """Return where in the memory of a window each of `extents` begins, and behind them its end."""
    places, page = [], 0
    for extent in extents:
        # As far into its page as its address is: so whole sectors around it can be read there.
        places.append(page + extent.start % PAGE_BYTES)
        page += pages_of(extent.start, extent.stop)
    return [*places, page]


def pages_of(start: int, stop: int) -> int:
    """Return how many bytes the pages have that the addresses from `start` to `stop` are in."""
    return -(-stop // PAGE_BYTES) * PAGE_BYTES - start // PAGE_BYTES * PAGE_BYTES


def _overlay(needs: Sequence[Ranges]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return the ranges that the same groups need, with those groups, in order."""
    counts = [len(each) for each in needs]
    group = np.repeat(np.arange(len(needs)), counts)
    # Ends first: where a range of a group touches the next one, the group is there again.
    address = np.concatenate([each.stop for each in needs] + [each.start for each in needs])
    who = np.concatenate([group, group])
    begins = np.arange(len(address)) >= len(group)
    order = np.argsort(address, kind="stable")
    found: list[tuple[int, int, tuple[int, ...]]] = []
    active: set[int] = set()
    before = 0
    events = zip(address[order].tolist(), who[order].tolist(), begins[order].tolist(), strict=True)
    for at, number, begin in events:
        if active and at > before:
            found.append((before, at, tuple(sorted(active))))
        before = at
        (active.add if begin else active.discard)(number)
    return found


def _ranges(pairs: Sequence[tuple[int, int]]) -> Ranges:
    columns = np.array(pairs, np.int64).reshape(len(pairs), 2)
    return merge_ranges(Ranges(columns[:, 0], columns[:, 1]))


class _Readers:
    """Chooses readers: of those that need an extent, the one with the least to read so far."""

    def __init__(self, members: Sequence[Sequence[int]], nbytes: Sequence[int]) -> None:
        self._members = members
        self._nbytes = list(nbytes)
        self._heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def take(self, groups: tuple[int, ...], nbytes: int) -> int:
        heap = self._heaps.get(groups)
        if heap is None:
            ranks = [rank for group in groups for rank in self._members[group]]
            heap = self._heaps[groups] = [(self._nbytes[rank], rank) for rank in ranks]
            heapq.heapify(heap)
        # What a rank got by another heap is entered here when it comes to the top.
        while heap[0][0] != self._nbytes[heap[0][1]]:
            rank = heap[0][1]
            heapq.heapreplace(heap, (self._nbytes[rank], rank))
        rank = heap[0][1]
        self._nbytes[rank] += nbytes
        heapq.heapreplace(heap, (self._nbytes[rank], rank))
        return rank

    def take_of(self, ranks: Sequence[int], nbytes: int) -> int:
        """Choose among any ranks."""
        rank = min(ranks, key=lambda each: (self._nbytes[each], each))
        self._nbytes[rank] += nbytes
        return rank


class _Windows:
    """Puts each extent into the first window in which every group that needs it has room."""

    def __init__(self, groups: int, most: int) -> None:
        self._most = most
        self._window = [0] * groups
        self._used = [0] * groups
        self.extents: list[list[Extent]] = []

    def add(self, extent: Extent, groups: Sequence[int]) -> None:
        nbytes = place_extents([extent])[-1]
        window = max(self._window[group] for group in groups)
        used = max(self._used[group] for group in groups if self._window[group] == window)
        if used and used + nbytes > self._most:
            window += 1
        for group in groups:
            if self._window[group] != window:
                self._window[group], self._used[group] = window, 0
            self._used[group] += nbytes
        self.extents += [[] for _ in range(window + 1 - len(self.extents))]
        self.extents[window].append(replace(extent, tag=len(self.extents[window])))
