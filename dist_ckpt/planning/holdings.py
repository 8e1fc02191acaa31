"""What the ranks of a job hold together: who has which box, checked to be whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.boxes import Box, check_cover, is_whole, volume
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.shard import itemsize
from dist_ckpt.planning.describe import Held

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
    starts = _rows([tile.box.offsets for tile in tiles], len(entry.shape))
    sizes = _rows([tile.box.sizes for tile in tiles], len(entry.shape))
    problem = check_cover(entry.shape, starts, sizes)
    if problem is not None:
        raise IncompatibleError(
            f"the ranks together do not hold tensor {entry.name!r} of part {entry.part!r} exactly "
            f"once: {problem}",
            kind=ErrorKind.COVERAGE,
        )


def _rows(values: Sequence[tuple[int, ...]], ndim: int) -> NDArray[np.int64]:
    return np.array(values, np.int64).reshape(len(values), ndim)


def _not_alike(first_rank: int, first: Held, rank: int, held: Held) -> IncompatibleError:
    return IncompatibleError(
        f"tensor {held.name!r} of part {held.part!r} is {first.dtype}{list(first.shape)} on rank "
        f"{first_rank} and {held.dtype}{list(held.shape)} on rank {rank}: one name must mean one "
        "tensor (PerRank(...) keeps values apart)",
        kind=ErrorKind.REPLICAS_DIFFER,
    )
