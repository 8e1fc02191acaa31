"""What the ranks of a job hold together: who has which box, checked to be whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.boxes import check_cover
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.shard import itemsize
from dist_ckpt.planning.columns import Alike, HeldByRank, Numbers, Row
from dist_ckpt.planning.describe import Held

TensorKey = tuple[str, str]
"""Part and name of a tensor."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Boxes of one tensor, of the same sizes, each of them held alike by as many ranks.

    No rank holds two of them, so that what is decided of one says nothing of another.

    Attributes:
        starts: int64[m, d], where each box starts.
        sizes: the extent of all of them.
        itemsize: bytes of an element.
        ranks: int64[m, n], the holders of each, ascending.
        positions: int64[m, n], where in what a holder holds the box is.
    """

    starts: Numbers
    sizes: tuple[int, ...]
    itemsize: int
    ranks: Numbers
    positions: Numbers

    @property
    def nbytes(self) -> int:
        """Size of one of the boxes."""
        return math.prod(self.sizes) * self.itemsize


@dataclass(frozen=True, slots=True)
class Tiles:
    """The boxes of one tensor, in the order of the ranks that hold them first.

    Attributes:
        entry: the tensor.
        starts: int64[k, d], where each box starts.
        sizes: int64[k, d], and its extent.
        first: int64[k + 1], where in `ranks` the holders of each box begin.
        ranks: int64[n], the holders of one box after those of the other, ascending for each box.
        positions: int64[n], where in what a holder holds the box is.
        unequal: bool[k], whether the holders may have different values.
    """

    entry: TensorEntry
    starts: Numbers
    sizes: Numbers
    first: Numbers
    ranks: Numbers
    positions: Numbers
    unequal: NDArray[np.bool_]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return itemsize(self.entry.dtype)

    @property
    def nbytes(self) -> Numbers:
        """int64[k], the size of each box."""
        nbytes: Numbers = np.prod(self.sizes, axis=1, dtype=np.int64) * self.itemsize
        return nbytes

    @property
    def is_shared(self) -> NDArray[np.bool_]:
        """bool[k], whether several ranks hold the same values of the box."""
        return (np.diff(self.first) > 1) & ~self.unequal

    def shared(self) -> Iterator[Shared]:
        """Yield the boxes that several ranks hold alike, as many together as there can be."""
        tiles = np.flatnonzero(self.is_shared)
        holders = np.diff(self.first)[tiles]
        for alike in _together(np.column_stack((holders, self.nbytes[tiles]))):
            found = [
                self._shared(tiles[some]) for some in _together(self.sizes[tiles[alike]], alike)
            ]
            ranks = np.concatenate([each.ranks.ravel() for each in found])
            if len(np.unique(ranks)) == len(ranks):
                yield from found
            else:  # one after the other, in their order
                yield from (self._shared(tiles[one : one + 1]) for one in alike.tolist())

    def _shared(self, tiles: Numbers) -> Shared:
        """Return some boxes of the same sizes and with as many holders."""
        first = self.first[tiles]
        holders = first[:, None] + np.arange(self.first[tiles[0] + 1] - first[0])
        sizes = tuple(self.sizes[tiles[0]].tolist())
        ranks, positions = self.ranks[holders], self.positions[holders]
        return Shared(self.starts[tiles], sizes, self.itemsize, ranks, positions)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What was said of one tensor: a row for each box that some rank holds of it."""

    first_rank: int
    entry: TensorEntry
    places: list[tuple[Alike, int]]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What all ranks hold.

    Attributes:
        world_size: how many ranks there are.
        tiles: for each tensor that somebody has to write its boxes.
        shared: those of them that several ranks hold alike.
        ties: by tensor, the name of the one in its part whose bytes are its bytes too.
    """

    world_size: int
    tiles: Sequence[Tiles]
    shared: Sequence[Shared]
    ties: Mapping[TensorKey, str]

    @classmethod
    def of(cls, held_by_rank: HeldByRank | Sequence[Sequence[Held]]) -> Holdings:
        """Put together what each rank holds.

        Raises:
            IncompatibleError: ranks disagree about a tensor, hold boxes of it that overlap without
                being equal, or do not hold all of it.
        """
        if not isinstance(held_by_rank, HeldByRank):
            held_by_rank = HeldByRank.of(held_by_rank)
        gathered = _gather(held_by_rank)
        tiles = {key: _tiles(rows) for key, rows in gathered.items()}
        ties = _ties(gathered, tiles)
        for each in tiles.values():
            _check_tiles(each)
        own = [each for key, each in tiles.items() if key not in ties]
        shared = [some for each in own for some in each.shared()]
        return cls(len(held_by_rank), own, shared, ties)

    def replicas(self) -> list[dict[int, list[int]]]:
        """For each rank, the positions of the boxes that it must hold just as others do.

        They are grouped by the ranks that hold them: a group has the same number, and the same
        boxes in the same order, on each of its ranks.
        """
        numbers: dict[bytes, int] = {}
        # By who holds them: the same ranks in pairs are not the same as all of them together.
        together: dict[tuple[tuple[int, ...], bytes], list[Shared]] = {}
        for shared in self.shared:
            key = (shared.ranks.shape, shared.ranks.tobytes())
            together.setdefault(key, []).append(shared)
        found: list[dict[int, list[int]]] = [{} for _ in range(self.world_size)]
        lists: dict[bytes, list[int]] = {}  # of ranks alike one, not one for each
        for alike in together.values():
            positions = np.stack([each.positions for each in alike], axis=2)
            for ranks, of_ranks in zip(alike[0].ranks, positions, strict=True):
                number = numbers.setdefault(ranks.tobytes(), len(numbers))
                for rank, own in zip(ranks.tolist(), of_ranks, strict=True):
                    mine = own.tobytes()
                    if mine not in lists:
                        lists[mine] = own.tolist()
                    before = found[rank].get(number)
                    found[rank][number] = lists[mine] if before is None else before + lists[mine]
        return found


def _gather(held_by_rank: HeldByRank) -> dict[TensorKey, _Rows]:
    gathered: dict[TensorKey, _Rows] = {}
    for group in held_by_rank.groups:
        rank = int(group.ranks[0])
        for position, row in enumerate(group.table.rows):
            key = (row.part, row.name)
            known = gathered.get(key)
            if known is None:
                entry = TensorEntry(row.part, row.name, row.dtype, row.shape)
                known = gathered[key] = _Rows(rank, entry, [])
            elif row.dtype != known.entry.dtype or row.shape != known.entry.shape:
                raise _not_alike(known.first_rank, known.entry, rank, row)
            known.places.append((group, position))
    return gathered


def _tiles(rows: _Rows) -> Tiles:
    """Find the distinct boxes of a tensor, and who holds each."""
    ndim = len(rows.entry.shape)
    boxes = np.concatenate([np.hstack(group.boxes(at)) for group, at in rows.places])
    ranks = np.concatenate([group.ranks for group, _ in rows.places])
    positions = np.concatenate([np.full(len(group.ranks), at) for group, at in rows.places])
    unequal = np.concatenate(
        [np.full(len(group.ranks), group.table.rows[at].unequal) for group, at in rows.places]
    )
    kept = np.arange(len(ranks))
    if len(rows.places) > 1:
        kept = np.lexsort((positions, ranks))
    if all(rows.entry.shape):  # without the empty shards of a tensor that has elements
        kept = kept[(boxes[kept, ndim:] > 0).all(axis=1)]
    else:
        # A tensor without elements is one chunk of its whole shape, however its nothing is cut.
        kept, unequal = kept[:1], np.zeros_like(unequal)
        boxes = np.array([[0] * ndim + list(rows.entry.shape)] * len(boxes), np.int64)
    boxes, ranks, positions = boxes[kept], ranks[kept], positions[kept]
    numbers, examples = _distinct(boxes)
    order = np.argsort(numbers, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(examples)))])
    differing = np.zeros(len(examples), np.bool_)
    differing[numbers[unequal[kept]]] = True
    starts, sizes = boxes[examples, :ndim], boxes[examples, ndim:]
    return Tiles(rows.entry, starts, sizes, first, ranks[order], positions[order], differing)


def _together(rows: Numbers, among: Numbers | None = None) -> list[Numbers]:
    """Return, for each distinct row as they first appear, where in `among` it stands."""
    if not len(rows):
        return []
    numbers, _ = _distinct(rows)
    order = np.argsort(numbers, kind="stable")
    stops = np.cumsum(np.bincount(numbers))
    return np.split(order if among is None else among[order], stops[:-1])


def _distinct(boxes: Numbers) -> tuple[Numbers, Numbers]:
    """Number the distinct rows as they first appear: the number of each row, a row of each."""
    if len(boxes) < 2 or (boxes == boxes[0]).all():
        return np.zeros(len(boxes), np.int64), np.arange(min(len(boxes), 1))
    if any(len(np.unique(column)) == len(boxes) for column in boxes.T):
        return np.arange(len(boxes)), np.arange(len(boxes))
    _, examples, numbers = np.unique(boxes, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(examples)
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    return rank_of[numbers.reshape(-1)], examples[order]


def _ties(
    gathered: Mapping[TensorKey, _Rows], tiles: Mapping[TensorKey, Tiles]
) -> dict[TensorKey, str]:
    """Find the tensors that are tied to one and the same other one wherever they are."""
    found: dict[TensorKey, str] = {}
    for key, rows in gathered.items():
        if not any(group.table.rows[at].tie for group, at in rows.places):
            continue
        names = {group.table.rows[at].tie for group, at in rows.places if _has_some(group, at)}
        if len(names) != 1 or "" in names:
            continue
        (other,) = names
        target = tiles.get((key[0], other))
        # The same boxes on the same ranks: where one rank has the other tensor alone, nobody has
        # said that its bytes are those of both.
        if target is not None and _places(target) == _places(tiles[key]):
            found[key] = other
    return found


def _has_some(group: Alike, position: int) -> bool:
    """Tell whether some rank of the group has an element of the box at `position`."""
    return bool((group.boxes(position)[1] > 0).all(axis=1).any())


def _places(tiles: Tiles) -> dict[bytes, bytes]:
    boxes = np.hstack((tiles.starts, tiles.sizes))
    ranks = np.split(tiles.ranks, tiles.first[1:-1])
    return {box.tobytes(): one.tobytes() for box, one in zip(boxes, ranks, strict=True)}


def _check_tiles(tiles: Tiles) -> None:
    shape = tiles.entry.shape
    # Most tensors are held whole, and the first save waits for this.
    if len(tiles.sizes) == 1 and not tiles.starts.any() and (tiles.sizes[0] == shape).all():
        return
    problem = check_cover(shape, tiles.starts, tiles.sizes)
    if problem is not None:
        raise IncompatibleError(
            f"the ranks together do not hold tensor {tiles.entry.name!r} of part "
            f"{tiles.entry.part!r} exactly once: {problem}",
            kind=ErrorKind.COVERAGE,
        )


def _not_alike(first_rank: int, first: TensorEntry, rank: int, row: Row) -> IncompatibleError:
    return IncompatibleError(
        f"tensor {row.name!r} of part {row.part!r} is {first.dtype}{list(first.shape)} on rank "
        f"{first_rank} and {row.dtype}{list(row.shape)} on rank {rank}: one name must mean one "
        "tensor (PerRank(...) keeps values apart)",
        kind=ErrorKind.REPLICAS_DIFFER,
    )
