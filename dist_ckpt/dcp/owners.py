"""Who writes what: a pure decision over the boxes that all ranks hold.

A box held by one rank is written by it. A box held by several ranks is split by rows over them,
so that every rank writes about the same number of bytes: four DDP ranks write a quarter each. (The
idea of splitting replicas at save time is that of orbax's replica slices and torchsnapshot's
partitioner.)
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from dist_ckpt.dcp.planner import Held, check_same
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.boxes import Box, check_cover, split_rows, volume
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.shard import itemsize

MIN_PIECE_BYTES = 64 * 1024
"""A shared box is not cut into smaller pieces: tiny chunks cost more than they balance."""


class Owned(msgspec.Struct, frozen=True, array_like=True):
    """A box that a rank writes: part of the box at position `held` of what it said it holds."""

    held: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box, in elements of the global tensor."""
        return Box(self.offsets, self.sizes)


class _Candidates:
    """The ranks that hold one and the same box of one tensor."""

    def __init__(self, entry: TensorEntry, box: Box) -> None:
        self.box = box
        self.itemsize = itemsize(entry.dtype)
        self.nbytes = volume(box) * self.itemsize
        self.holders: list[tuple[int, int]] = []  # rank, position in what the rank holds
        self.unequal = False


def decide(held_by_rank: Sequence[Sequence[Held]]) -> list[list[Owned]]:
    """Return what each rank writes, so that every element of every tensor is written once.

    Args:
        held_by_rank: for each rank the boxes it holds.

    Returns:
        For each rank its boxes, in the order of what it holds.

    Raises:
        IncompatibleError: ranks disagree about a tensor, hold boxes of it that overlap without
            being equal, or do not hold all of it.
    """
    candidates = _gather(held_by_rank)
    loads = [0] * len(held_by_rank)
    owned: list[list[Owned]] = [[] for _ in held_by_rank]
    # What only one rank can write comes first: the shared boxes then even out the loads, the
    # largest first, as in longest-processing-time scheduling.
    order = sorted(candidates, key=lambda c: (len(c.holders) > 1 and not c.unequal, -c.nbytes))
    for candidate in order:
        for (rank, position), piece in _share(candidate, loads):
            loads[rank] += volume(piece) * candidate.itemsize
            owned[rank].append(Owned(position, piece.offsets, piece.sizes))
    for boxes in owned:
        boxes.sort(key=lambda box: (box.held, box.offsets))
    return owned


def _share(candidate: _Candidates, loads: Sequence[int]) -> list[tuple[tuple[int, int], Box]]:
    """Cut one box over its holders, the least loaded one getting the first (largest) piece."""
    if candidate.unequal:
        # Pieces of different values would be a tensor that no rank ever had.
        return [(min(candidate.holders), candidate.box)]
    holders = sorted(candidate.holders, key=lambda holder: (loads[holder[0]], holder[0]))
    count = max(1, min(len(holders), candidate.nbytes // MIN_PIECE_BYTES))
    pieces = [candidate.box] if count == 1 else split_rows(candidate.box, count)
    pieces.sort(key=lambda piece: (-volume(piece), piece.offsets))
    return list(zip(holders, pieces, strict=False))


def _gather(held_by_rank: Sequence[Sequence[Held]]) -> list[_Candidates]:
    """Group equal boxes over ranks and check that the boxes of each tensor tile it."""
    described: dict[tuple[str, str], list[tuple[int, TensorEntry]]] = {}
    groups: dict[tuple[str, str], dict[Box, _Candidates]] = {}
    for rank, boxes in enumerate(held_by_rank):
        for position, held in enumerate(boxes):
            key = (held.part, held.name)
            described.setdefault(key, []).append((rank, held.tensor))
            by_box = groups.setdefault(key, {})
            if volume(held.box) or not all(held.shape):
                group = by_box.setdefault(held.box, _Candidates(held.tensor, held.box))
                group.holders.append((rank, position))
                group.unequal |= held.unequal
    candidates: list[_Candidates] = []
    for key, entries in described.items():
        check_same(entries)
        entry = entries[0][1]
        tiles = _tiles(entry, groups[key])
        _check_tiles(entry, tiles)
        candidates += tiles
    return candidates


def _tiles(entry: TensorEntry, by_box: dict[Box, _Candidates]) -> list[_Candidates]:
    if all(entry.shape):
        return list(by_box.values())
    # A tensor without elements is one chunk of its whole shape, however ranks cut their nothing.
    first = min(group.holders[0] for group in by_box.values())
    whole = _Candidates(entry, Box((0,) * len(entry.shape), entry.shape))
    whole.holders.append(first)
    return [whole]


def _check_tiles(entry: TensorEntry, tiles: Sequence[_Candidates]) -> None:
    ndim = len(entry.shape)
    starts = np.array([tile.box.offsets for tile in tiles], np.int64).reshape(len(tiles), ndim)
    sizes = np.array([tile.box.sizes for tile in tiles], np.int64).reshape(len(tiles), ndim)
    problem = check_cover(entry.shape, starts, sizes)
    if problem is not None:
        raise IncompatibleError(
            f"the ranks together do not hold tensor {entry.name!r} of part {entry.part!r} exactly "
            f"once: {problem}",
            kind=ErrorKind.COVERAGE,
        )
