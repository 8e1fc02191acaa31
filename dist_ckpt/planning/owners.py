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

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.format.boxes import Box, split_rows, volume
from dist_ckpt.planning.describe import Held
from dist_ckpt.planning.holdings import Candidate, Holdings

MIN_PIECE_BYTES = 64 * 1024
"""A shared box is not cut into smaller pieces: tiny chunks cost more than they balance."""

_MAX_ROW_SHARE = 0.05
"""A row that is a larger part of what a rank writes on average is cut itself."""


class Owned(msgspec.Struct, frozen=True, array_like=True):
    """A box that a rank writes: part of the box at position `held` of what it said it holds."""

    held: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box, in elements of the global tensor."""
        return Box(self.offsets, self.sizes)


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
    return share_out(Holdings.of(held_by_rank), max_piece_bytes=max_piece_bytes)


def share_out(holdings: Holdings, *, max_piece_bytes: int | None = None) -> list[list[Owned]]:
    """Do as `decide`, for holdings that were gathered before."""
    world_size = holdings.world_size
    loads = np.zeros(world_size, np.int64)
    owned: list[list[Owned]] = [[] for _ in range(world_size)]

    def give(candidate: Candidate, holder: int, box: Box) -> None:
        rank, position = candidate.holders[holder]
        loads[rank] += volume(box) * candidate.itemsize
        for piece in _bounded(box, candidate.itemsize, max_piece_bytes):
            owned[rank].append(Owned(position, piece.offsets, piece.sizes))

    shared: list[Candidate] = []
    for candidate in holdings.candidates:
        if len(candidate.holders) > 1 and not candidate.unequal:
            shared.append(candidate)
        else:
            # Pieces of values that differ would be a tensor that no rank ever had: the lowest
            # holder, which was gathered first, has it whole.
            give(candidate, 0, candidate.box)
    mean = sum(candidate.nbytes for candidate in holdings.candidates) / world_size
    # What only one rank can write came first. Then those with the fewest holders, which have the
    # least choice, and of these the largest: what is left evens out what came before.
    shared.sort(key=lambda candidate: (len(candidate.holders), -candidate.nbytes))
    for candidate in shared:
        for box in _cut_rows(candidate, mean):
            for holder, piece in _pour(candidate, box, loads):
                give(candidate, holder, piece)
    for boxes in owned:
        boxes.sort(key=lambda box: (box.held, box.offsets))
    return owned


def _pour(candidate: Candidate, box: Box, loads: NDArray[np.int64]) -> list[tuple[int, Box]]:
    """Cut `box` by rows over the holders, so that the emptiest come up to one level."""
    nbytes = volume(box) * candidate.itemsize
    present = loads[candidate.ranks]
    if nbytes < 2 * MIN_PIECE_BYTES:
        return [(int(present.argmin()), box)]
    order = np.argsort(present, kind="stable")
    level_before = present[order]
    counts = np.arange(1, len(order) + 1)
    # The level that the first n of them reach together, and what the fullest of these then takes.
    levels = (nbytes + np.cumsum(level_before)) / counts
    takes = levels - level_before
    # `takes` falls from holder to holder; the first one always takes all it can.
    count = max(1, int(np.count_nonzero(takes >= MIN_PIECE_BYTES)))
    if count == 1:
        return [(int(order[0]), box)]
    shares = levels[count - 1] - level_before[:count]
    dim, rows = _rows(box)
    stops = np.rint(np.cumsum(shares) * (rows / nbytes)).astype(np.int64)
    stops[-1] = rows  # whatever the rounding did
    pieces, start = [], 0
    for holder, stop in zip(order[:count].tolist(), stops.tolist(), strict=True):
        if stop > start:
            pieces.append((holder, _part(box, dim, start, stop)))
            start = stop
    return pieces


def _cut_rows(candidate: Candidate, mean: float) -> list[Box]:
    """Return the box whole, or its rows where they are too coarse to be shared out evenly."""
    box = candidate.box
    boxes = [box]
    while True:
        dim, rows = _rows(boxes[0])
        row_bytes = volume(boxes[0]) * candidate.itemsize / rows
        if rows == 1 or row_bytes <= max(MIN_PIECE_BYTES, _MAX_ROW_SHARE * mean):
            return boxes
        boxes = [_part(one, dim, row, row + 1) for one in boxes for row in range(rows)]


def _bounded(box: Box, itemsize: int, max_piece_bytes: int | None) -> list[Box]:
    nbytes = volume(box) * itemsize
    if max_piece_bytes is None or nbytes <= max_piece_bytes or volume(box) <= 1:
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
