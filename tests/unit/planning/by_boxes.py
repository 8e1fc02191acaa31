"""Who writes what, as it was decided box by box: what planning by columns is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.files import itemsize
from dist_ckpt.format.index import Box, Held, TensorEntry, check_cover, is_whole, split_rows, volume
from dist_ckpt.planning.owners import MIN_PIECE_BYTES, Owned

_MAX_ROW_SHARE = 0.05

TensorKey = tuple[str, str]
"""Part and name of a tensor."""


@dataclass(slots=True)
class Candidate:
    """One box of one tensor, and the ranks that could write it.

    Attributes:
        box: in elements of the global tensor.
        itemsize: bytes of an element.
        holders: (rank, position in what the rank holds), ascending.
        unequal: whether the holders may have different values.
    """

    box: Box
    itemsize: int
    holders: list[tuple[int, int]] = field(default_factory=list)
    unequal: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the box."""
        return volume(self.box) * self.itemsize

    @property
    def ranks(self) -> list[int]:
        """The ranks among the holders, ascending."""
        return [rank for rank, _ in self.holders]


_Boxes = dict[tuple[tuple[int, ...], tuple[int, ...]], Candidate]


@dataclass(slots=True)
class _Gathered:
    """All that was said of one tensor."""

    first_rank: int
    first: Held
    boxes: _Boxes = field(default_factory=dict)
    # The names it was said to be tied to, by all holders of some element of it.
    ties: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What all ranks hold.

    Attributes:
        world_size: how many ranks there are.
        candidates: every box that somebody has to write, tensor by tensor.
        ties: by tensor, the name of the one in its part whose bytes are its bytes too.
    """

    world_size: int
    candidates: Sequence[Candidate]
    ties: Mapping[TensorKey, str]

    @classmethod
    def of(cls, held_by_rank: Sequence[Sequence[Held]]) -> Holdings:
        """Put together what each rank holds.

        Raises:
            IncompatibleError: ranks disagree about a tensor, hold boxes of it that overlap without
                being equal, or do not hold all of it.
        """
        gathered = _gather(held_by_rank)
        ties = _ties(gathered)
        candidates: list[Candidate] = []
        for key, tensor in gathered.items():
            entry = tensor.first.tensor
            tiles = _tiles(entry, tensor)
            _check_tiles(entry, tiles)
            if key not in ties:
                candidates += tiles
        return cls(len(held_by_rank), candidates, ties)

    def replicas(self) -> list[dict[int, list[int]]]:
        """For each rank, the positions of the boxes that it must hold just as others do.

        They are grouped by the ranks that hold them: a group has the same number, and the same
        boxes in the same order, on each of its ranks.
        """
        positions: list[dict[int, list[int]]] = [{} for _ in range(self.world_size)]
        numbers: dict[tuple[int, ...], int] = {}
        for candidate in self.candidates:
            if len(candidate.holders) > 1 and not candidate.unequal:
                number = numbers.setdefault(tuple(candidate.ranks), len(numbers))
                for rank, position in candidate.holders:
                    positions[rank].setdefault(number, []).append(position)
        return positions


def _gather(held_by_rank: Sequence[Sequence[Held]]) -> dict[TensorKey, _Gathered]:
    gathered: dict[TensorKey, _Gathered] = {}
    for rank, held_boxes in enumerate(held_by_rank):
        for position, held in enumerate(held_boxes):
            key = (held.part, held.name)
            tensor = gathered.get(key)
            if tensor is None:
                tensor = gathered[key] = _Gathered(rank, held)
            elif held.dtype != tensor.first.dtype or held.shape != tensor.first.shape:
                raise _not_alike(tensor.first_rank, tensor.first, rank, held)
            if 0 in held.sizes and all(held.shape):
                continue  # an empty shard of a tensor that has elements
            where = (held.offsets, held.sizes)
            candidate = tensor.boxes.get(where)
            if candidate is None:
                candidate = Candidate(Box(*where), itemsize(held.dtype))
                tensor.boxes[where] = candidate
            candidate.holders.append((rank, position))
            candidate.unequal |= held.unequal
            tensor.ties.add(held.tie)
    return gathered


def _ties(gathered: Mapping[TensorKey, _Gathered]) -> dict[TensorKey, str]:
    """Find the tensors that are tied to one and the same other one wherever they are."""
    found: dict[TensorKey, str] = {}
    for (part, name), tensor in gathered.items():
        if len(tensor.ties) != 1 or "" in tensor.ties:
            continue
        (other,) = tensor.ties
        target = gathered.get((part, other))
        # The same boxes on the same ranks: where one rank has the other tensor alone, nobody has
        # said that its bytes are those of both.
        if target is not None and _places(target) == _places(tensor):
            found[part, name] = other
    return found


def _places(tensor: _Gathered) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]]:
    return {where: candidate.ranks for where, candidate in tensor.boxes.items()}


def _tiles(entry: TensorEntry, tensor: _Gathered) -> list[Candidate]:
    if all(entry.shape):
        return list(tensor.boxes.values())
    # A tensor without elements is one chunk of its whole shape, however ranks cut their nothing.
    first = min(candidate.holders[0] for candidate in tensor.boxes.values())
    whole = Box((0,) * len(entry.shape), entry.shape)
    return [Candidate(whole, itemsize(entry.dtype), [first])]


def _check_tiles(entry: TensorEntry, tiles: Sequence[Candidate]) -> None:
    # Most tensors are held whole, and the first save waits for this.
    if len(tiles) == 1 and is_whole(tiles[0].box, entry.shape):
        return
    starts = _as_rows([tile.box.offsets for tile in tiles], len(entry.shape))
    sizes = _as_rows([tile.box.sizes for tile in tiles], len(entry.shape))
    problem = check_cover(entry.shape, starts, sizes)
    if problem is not None:
        raise IncompatibleError(
            f"the ranks together do not hold tensor {entry.name!r} of part {entry.part!r} exactly "
            f"once: {problem}",
            kind=ErrorKind.COVERAGE,
        )


def _as_rows(values: Sequence[tuple[int, ...]], ndim: int) -> NDArray[np.int64]:
    return np.array(values, np.int64).reshape(len(values), ndim)


def _not_alike(first_rank: int, first: Held, rank: int, held: Held) -> IncompatibleError:
    return IncompatibleError(
        f"tensor {held.name!r} of part {held.part!r} is {first.dtype}{list(first.shape)} on rank "
        f"{first_rank} and {held.dtype}{list(held.shape)} on rank {rank}: one name must mean one "
        "tensor (PerRank(...) keeps values apart)",
        kind=ErrorKind.REPLICAS_DIFFER,
    )


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
