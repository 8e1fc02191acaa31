"""Who writes what: a pure decision over the boxes that all ranks hold.

A box held by one rank is written by it. A box held by several ranks is split by rows over them,
so that every rank writes about the same number of bytes: four DDP ranks write a quarter each. (The
idea of splitting replicas at save time is that of orbax's replica slices and torchsnapshot's
partitioner.)

Each shared box is poured over its holders as water is over uneven ground: the emptiest are filled
first, up to one level. How even it gets: where every box is held by all ranks, no rank writes more
than 1.1 times the mean plus twice `MIN_PIECE_BYTES`. Where boxes are held by some ranks only
(experts, stages, replicas of shards), the same holds with the mean of whichever set of ranks has
the most to write that no other rank holds, as long as sets of holders that overlap are nested.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.format.index import Box, Held, split_rows, volume
from dist_ckpt.planning.columns import (
    HeldByRank,
    Numbers,
    pack_numbers,
    shape_order,
    steps_of,
    unpack_numbers,
)
from dist_ckpt.planning.holdings import Holdings, Shared, Tiles

MIN_PIECE_BYTES = 64 * 1024
"""A shared box is not cut into smaller pieces: tiny chunks cost more than they balance."""

_MAX_ROW_SHARE = 0.05
"""A row that is a larger part of what a rank writes on average is cut itself."""


@decodable
class Owned(msgspec.Struct, frozen=True, array_like=True):
    """A box that a rank writes: part of the box at position `held` of what it said it holds."""

    held: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box, in elements of the global tensor."""
        return Box(self.offsets, self.sizes)


@decodable
class OwnedShare(msgspec.Struct, frozen=True, array_like=True):
    """What a rank is told to write.

    Attributes:
        whole: a bit for each of its boxes, whether it writes it as it is; deflated.
        pieces: the other ones, those of so many dimensions together: how many they are, the steps
            from place to place (`Table.places`), and then, column by column, by how much their
            offsets and sizes differ from those of the box that the rank holds. Shape by shape, as
            what is poured over many ranks is cut much alike where the shapes are equal.
    """

    whole: bytes
    pieces: bytes


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Boxes of so many dimensions that ranks write: int64[k, 1 + 2 * d], in the order of ranks.

    Attributes:
        ranks: int64[k], who writes each.
        numbers: for each the position among what the rank holds, the offsets, the sizes.
    """

    ranks: Numbers
    numbers: Numbers

    @classmethod
    def of_all(cls, ranks: Sequence[Numbers], numbers: Sequence[Numbers]) -> _Pieces:
        """Put together what was given piece by piece."""
        every = np.concatenate(ranks)
        order = np.argsort(every, kind="stable")
        return cls(every[order], np.concatenate(numbers)[order])

    def of(self, rank: int) -> Numbers:
        """Return the numbers of what `rank` writes, by position."""
        start, stop = np.searchsorted(self.ranks, (rank, rank + 1))
        mine = self.numbers[start:stop]
        return mine[np.argsort(mine[:, 0], kind="stable")]


@dataclass(frozen=True)
class OwnedByRank(Sequence[list[Owned]]):
    """What each rank writes; as a sequence, the boxes of one rank at a time.

    Most boxes are written by a rank as it holds them, which takes one bit to say. For each other
    one there are numbers: its position, its offsets, its sizes.

    Attributes:
        held_by_rank: what the ranks hold.
        whole: tensors, and which of their boxes are written as they are held, by the first holder.
    """

    held_by_rank: HeldByRank
    whole: Sequence[tuple[Tiles, NDArray[np.bool_]]]
    # Rank after rank, for each box that it holds: whether it writes it as it is.
    _flat: NDArray[np.bool_]
    _first: Numbers
    _pieces: Sequence[_Pieces]

    def __len__(self) -> int:
        return len(self.held_by_rank)

    @overload
    def __getitem__(self, rank: int) -> list[Owned]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[list[Owned]]: ...
    def __getitem__(self, rank: int | slice) -> list[Owned] | list[list[Owned]]:
        if isinstance(rank, slice):
            return [self[one] for one in range(len(self))[rank]]
        return read_owned(self.share(rank), self.held_by_rank[rank])

    def piece_columns(self) -> Iterator[tuple[Numbers, Numbers, Numbers, Numbers]]:
        """Yield all other boxes, those of so many dimensions together.

        Yields:
            int64[k] ranks and positions, and the offsets and sizes int64[k, d].
        """
        for each in self._pieces:
            ndim = each.numbers.shape[1] // 2
            numbers = each.numbers
            yield each.ranks, numbers[:, 0], numbers[:, 1 : ndim + 1], numbers[:, ndim + 1 :]

    def share(self, rank: int) -> OwnedShare:
        """Return what `rank` writes, as it is told to it."""
        whole = np.packbits(self._flat[self._first[rank] : self._first[rank + 1]]).tobytes()
        table, held = self.held_by_rank.place(rank)
        told = [np.zeros(0, np.int64)]
        for mine in (each.of(rank) for each in self._pieces):
            if len(mine):
                places = table.places[mine[:, 0]]
                order = np.argsort(places, kind="stable")
                mine, places = mine[order], places[order]
                columns = table.starts[mine[:, 0], None] + np.arange(mine.shape[1] - 1)
                differ = (mine[:, 1:] - held[columns]).T
                told += [np.array([len(mine)]), steps_of(places), differ.ravel()]
        return OwnedShare(zlib.compress(whole), pack_numbers(np.concatenate(told)))


def read_owned(share: OwnedShare, held: Sequence[Held]) -> list[Owned]:
    """Return the boxes that a rank writes, in the order of what it holds.

    Args:
        share: what it was told.
        held: the boxes it holds.
    """
    # One byte more than are wanted, so that no other number of them is taken for it.
    whole = zlib.decompressobj().decompress(share.whole, len(held) // 8 + 2)
    bits = np.unpackbits(np.frombuffer(whole, np.uint8), count=len(held))
    owned = [
        Owned(position, held[position].offsets, held[position].sizes)
        for position in np.flatnonzero(bits).tolist()
    ]
    numbers, order = unpack_numbers(share.pieces), shape_order(box.shape for box in held)
    while numbers.size:
        count = int(numbers[0])
        positions = order[np.cumsum(numbers[1 : count + 1])].tolist()
        ndim = len(held[positions[0]].shape)
        of_all, numbers = np.split(numbers[count + 1 :], [2 * ndim * count])
        for position, differ in zip(positions, of_all.reshape(2 * ndim, count).T, strict=True):
            box = held[position]
            mine = (differ + np.array((*box.offsets, *box.sizes), np.int64)).tolist()
            owned.append(Owned(position, tuple(mine[:ndim]), tuple(mine[ndim:])))
    # Whole boxes and pieces were told apart.
    return sorted(owned, key=lambda box: (box.held, box.offsets))


def decide(
    held_by_rank: Sequence[Sequence[Held]], *, max_piece_bytes: int | None = None
) -> list[list[Owned]]:
    """Return what each rank writes, so that every element of every tensor is written once.

    Args:
        held_by_rank: for each rank the boxes it holds.
        max_piece_bytes: an owned box of more bytes is cut, down to one element at the least; None
            for no limit.

    Returns:
        For each rank its boxes, in the order of what it holds. A tensor that is the same memory as
        another one on all ranks (`Holdings.ties`) has none: it is written under the other name.

    Raises:
        IncompatibleError: ranks disagree about a tensor, hold boxes of it that overlap without
            being equal, or do not hold all of it.
    """
    held = HeldByRank.of(held_by_rank)
    return list(share_out(held, Holdings.of(held), max_piece_bytes=max_piece_bytes))


def share_out(
    held_by_rank: HeldByRank, holdings: Holdings, *, max_piece_bytes: int | None = None
) -> OwnedByRank:
    """Do as `decide`, for holdings that were gathered before."""
    sharing = _Sharing(held_by_rank, max_piece_bytes)
    for tiles in holdings.tiles:
        sharing.give_alone(tiles)
    nbytes = sum(len(tiles.tensors) * int(tiles.nbytes.sum()) for tiles in holdings.tiles)
    mean = nbytes / holdings.world_size
    # What only one rank can write came first. Then those with the fewest holders, which have the
    # least choice, and of these the largest: what is left evens out what came before.
    for each in sorted(holdings.shared, key=lambda each: (each.ranks.shape[1], -each.nbytes)):
        for box in _cut_rows(each, mean):
            sharing.pour(each, box)
    return sharing.done()


class _Sharing:
    """What was given to whom so far."""

    def __init__(self, held_by_rank: HeldByRank, max_piece_bytes: int | None) -> None:
        counts = held_by_rank.counts()
        self._held_by_rank = held_by_rank
        self._most = max_piece_bytes
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._flat = np.zeros(self._first[-1], np.bool_)
        self._whole: list[tuple[Tiles, NDArray[np.bool_]]] = []
        self._loads = np.zeros(len(counts), np.int64)
        self._pieces: dict[int, tuple[list[Numbers], list[Numbers]]] = {}

    def done(self) -> OwnedByRank:
        """Return what everybody has now."""
        pieces = [_Pieces.of_all(ranks, numbers) for ranks, numbers in self._pieces.values()]
        return OwnedByRank(self._held_by_rank, self._whole, self._flat, self._first, pieces)

    def give_alone(self, tiles: Tiles) -> None:
        """Give the boxes that one rank holds to that rank, and all that ranks may not share."""
        alone = ~tiles.is_shared
        # Pieces of values that differ would be a tensor that no rank ever had: the lowest holder,
        # which comes first, has it whole.
        at = tiles.first[:-1][alone]
        ranks, places, nbytes = tiles.ranks[at], tiles.places[at], tiles.nbytes[alone]
        # Without elements the box is the whole shape, which is not as a rank holds it.
        if all(tiles.entry.shape) and (self._most is None or (nbytes <= self._most).all()):
            self._whole.append((tiles, alone))
            # Not by `+=`, which counts a rank once however often it is there.
            np.add.at(self._loads, ranks, nbytes * len(tiles.tensors))
            for positions in tiles.at:
                self._flat[self._first[ranks] + positions[places]] = True
        else:
            boxes = (tiles.starts[alone], tiles.sizes[alone])
            for positions in tiles.at:
                self._give(ranks, positions[places], boxes, tiles.itemsize)

    def pour(self, shared: Shared, box: Box) -> None:
        """Cut a box by rows over its holders, so that the emptiest come up to one level.

        Args:
            shared: the boxes that are shared out alike.
            box: a part of each of them, counted from where it starts.
        """
        nbytes = volume(box) * shared.itemsize
        dim, rows = _rows(box)
        which, holders, starts, stops = _levelled(self._loads[shared.ranks], nbytes, rows)
        offsets = shared.starts[which] + np.array(box.offsets, np.int64)
        sizes = np.tile(np.array(box.sizes, np.int64), (len(which), 1))
        # A number without dimensions has no row, and goes to one rank.
        if box.sizes:
            offsets[:, dim] += starts
            sizes[:, dim] = stops - starts
        at = which, holders
        self._give(shared.ranks[at], shared.positions[at], (offsets, sizes), shared.itemsize)

    def _give(
        self, ranks: Numbers, positions: Numbers, boxes: tuple[Numbers, Numbers], itemsize: int
    ) -> None:
        """Give boxes, of which each is a part of what a rank holds at a position."""
        offsets, sizes = boxes
        nbytes = np.prod(sizes, axis=1, dtype=np.int64) * itemsize
        np.add.at(self._loads, ranks, nbytes)
        numbers = np.column_stack((positions, offsets, sizes))
        if self._most is not None and (nbytes > self._most).any():
            cut = [_cut(one, itemsize, self._most) for one in numbers]
            ranks = np.repeat(ranks, [len(pieces) for pieces in cut])
            numbers = np.concatenate(cut)
        of_ranks, given = self._pieces.setdefault(offsets.shape[1], ([], []))
        of_ranks.append(ranks)
        given.append(numbers)


def _levelled(loads: Numbers, nbytes: int, rows: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Pour boxes over their holders.

    Args:
        loads: int64[m, n], how much the n holders of each box have to write already.
        nbytes: size of each box.
        rows: how many rows it has.

    Returns:
        For each piece which box it is of, which of its holders takes it, its first row, and the
        row behind its last.
    """
    every = np.arange(len(loads))
    # It cannot be cut in two, so the emptiest has all of it.
    if nbytes < 2 * MIN_PIECE_BYTES:
        return every, loads.argmin(axis=1), np.zeros_like(every), np.full_like(every, rows)
    # Stable: of holders that are equally full the lowest rank comes first.
    order = np.argsort(loads, axis=1, kind="stable")
    before = np.take_along_axis(loads, order, axis=1)
    counts = np.arange(1, loads.shape[1] + 1)
    # The level that the first n of them reach together, and what the fullest of these then takes.
    levels = (nbytes + np.cumsum(before, axis=1)) / counts
    # That falls from holder to holder; the first one always takes all it can.
    takes = np.count_nonzero(levels - before >= MIN_PIECE_BYTES, axis=1).clip(min=1)
    level = levels[every, takes - 1][:, None]
    shares = np.where(counts <= takes[:, None], level - before, 0)
    stops = np.rint(np.cumsum(shares, axis=1) * (rows / nbytes)).astype(np.int64)
    stops[counts >= takes[:, None]] = rows  # whatever the rounding did
    starts = np.column_stack((np.zeros_like(every), stops[:, :-1]))
    # Whose share was rounded to no row gets no piece: the format has no empty chunks.
    which, places = np.nonzero(stops > starts)
    return which, order[which, places], starts[which, places], stops[which, places]


def _cut(numbers: Numbers, itemsize: int, most: int) -> Numbers:
    """Cut one box, given as position, offsets and sizes, into boxes of at most so many bytes."""
    position, *rest = numbers.tolist()
    ndim = len(rest) // 2
    pieces = _bounded(Box(tuple(rest[:ndim]), tuple(rest[ndim:])), itemsize, most)
    return np.array([(position, *each.offsets, *each.sizes) for each in pieces], np.int64)


def _cut_rows(shared: Shared, mean: float) -> list[Box]:
    """Return a box whole, or its rows where they are too coarse to be shared out evenly."""
    boxes = [Box((0,) * len(shared.sizes), shared.sizes)]
    while True:
        dim, rows = _rows(boxes[0])
        row_bytes = volume(boxes[0]) * shared.itemsize / rows
        if rows == 1 or row_bytes <= max(MIN_PIECE_BYTES, _MAX_ROW_SHARE * mean):
            return boxes
        boxes = [_part(one, dim, row, row + 1) for one in boxes for row in range(rows)]


def _bounded(box: Box, itemsize: int, max_piece_bytes: int) -> list[Box]:
    nbytes = volume(box) * itemsize
    # One element is the least, whatever the limit.
    if nbytes <= max_piece_bytes or volume(box) <= 1:
        return [box]
    pieces = split_rows(box, -(-nbytes // max_piece_bytes))
    # A row may still be too large: then it is cut along its next dimension.
    return [small for one in pieces for small in _bounded(one, itemsize, max_piece_bytes)]


def _rows(box: Box) -> tuple[int, int]:
    """Return the first dimension of more than one element, and how many it has."""
    return next(((dim, size) for dim, size in enumerate(box.sizes) if size > 1), (0, 1))


def _part(box: Box, dim: int, start: int, stop: int) -> Box:
    offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
    return Box(offsets, (*box.sizes[:dim], stop - start, *box.sizes[dim + 1 :]))
