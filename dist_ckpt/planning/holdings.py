"""What the ranks of a job hold together: who has which box, checked to be whole tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.files import itemsize
from dist_ckpt.format.index import Held, TensorEntry, check_cover
from dist_ckpt.planning.columns import Alike, HeldByRank, Numbers, Row

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
        places: int64[m, n], which of `at` is of a holder.
        at: int64[p], where in what a holder holds the box is.
    """

    starts: Numbers
    sizes: tuple[int, ...]
    itemsize: int
    ranks: Numbers
    places: Numbers
    at: Numbers

    @property
    def nbytes(self) -> int:
        """Size of one of the boxes."""
        return math.prod(self.sizes) * self.itemsize

    @property
    def positions(self) -> Numbers:
        """int64[m, n], where in what a holder holds the box is."""
        return self.at[self.places]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The boxes of tensors that are cut alike, in the order of the ranks that hold them first.

    Such tensors have one shape and one dtype, and differ in their names and in where the ranks have
    them. A model has thousands of tensors, and few ways in which they are cut.

    Attributes:
        entry: the first of them.
        tensors: int64[t], the number of each, ascending.
        starts: int64[k, d], where each box starts.
        sizes: int64[k, d], and its extent.
        first: int64[k + 1], where in `ranks` the holders of each box begin.
        ranks: int64[n], the holders of one box after those of the other, ascending for each box.
        places: int64[n], which column of `at` is of a holder.
        at: int64[t, p], for each tensor, where in what a holder holds the box is.
        unequal: bool[k], whether the holders may have different values.
    """

    entry: TensorEntry
    tensors: Numbers
    starts: Numbers
    sizes: Numbers
    first: Numbers
    ranks: Numbers
    places: Numbers
    at: Numbers
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

    def without(self, tensors: Collection[int]) -> Tiles:
        """Return the same of all tensors but some."""
        kept = ~np.isin(self.tensors, list(tensors))
        return replace(self, tensors=self.tensors[kept], at=self.at[kept])

    def shared(self) -> Iterator[tuple[int, Shared]]:
        """Yield the boxes that several ranks hold alike, as many together as there can be.

        Yields:
            The number of a tensor, and boxes of it; tensor by tensor.
        """
        alike = list(self._shared())
        for number, at in zip(self.tensors.tolist(), self.at, strict=True):
            for each in alike:
                yield number, replace(each, at=at)

    def _shared(self) -> Iterator[Shared]:
        """Yield those of the first tensor."""
        tiles = np.flatnonzero(self.is_shared)
        holders = np.diff(self.first)[tiles]
        for alike in _together(np.column_stack((holders, self.nbytes[tiles]))):
            found = [
                self._of_one_size(tiles[some])
                for some in _together(self.sizes[tiles[alike]], alike)
            ]
            ranks = np.concatenate([each.ranks.ravel() for each in found])
            # No rank has two of them, which `Shared` promises to who pours them at once.
            if len(np.unique(ranks)) == len(ranks):
                yield from found
            else:  # one after the other, in their order
                yield from (self._of_one_size(tiles[one : one + 1]) for one in alike.tolist())

    def _of_one_size(self, tiles: Numbers) -> Shared:
        """Return some boxes of the same sizes and with as many holders."""
        first = self.first[tiles]
        holders = first[:, None] + np.arange(self.first[tiles[0] + 1] - first[0])
        sizes = tuple(self.sizes[tiles[0]].tolist())
        ranks, places = self.ranks[holders], self.places[holders]
        return Shared(self.starts[tiles], sizes, self.itemsize, ranks, places, self.at[0])


@dataclass(slots=True)
class _Said:
    """What was said of one tensor.

    Attributes:
        first_rank: the first that said something.
        entry: the tensor.
        is_tied: whether anybody said that it is another tensor's memory.
        kinds: for each box that ranks alike hold of it, the number of the group, and that of what
            their boxes are; equal for tensors that are cut alike.
        at: and where in what they hold it is.
    """

    first_rank: int
    entry: TensorEntry
    is_tied: bool
    kinds: list[tuple[int, int]]
    at: list[int]

    def boxes(self, groups: Sequence[Alike]) -> list[tuple[Alike, int]]:
        """Return the boxes: of which ranks alike, and where in what they hold."""
        return [(groups[number], at) for (number, _), at in zip(self.kinds, self.at, strict=True)]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What all ranks hold.

    Attributes:
        world_size: how many ranks there are.
        tensors: every tensor, in the order in which the ranks hold them.
        numbers: for each group of ranks alike, the number of the tensor of each box.
        tiles: the boxes of all tensors that somebody has to write.
        shared: those of them that several ranks hold alike, tensor by tensor.
        ties: by tensor, the name of the one in its part whose bytes are its bytes too.
    """

    world_size: int
    tensors: Sequence[TensorEntry]
    numbers: Sequence[list[int]]
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
        said, numbers = _gather(held_by_rank)
        tiles = _tiles_of_all(held_by_rank.groups, list(said.values()))
        ties = _ties(held_by_rank.groups, said, tiles)
        # Tied ones too: under whatever name it is written, a tensor has to be whole.
        for each in tiles:
            _check_tiles(each)
        if ties:
            tied = {number for number, key in enumerate(said) if key in ties}
            tiles = [each for each in (one.without(tied) for one in tiles) if len(each.tensors)]
        # Stable, so that the boxes of a tensor stay in the order in which ranks hold them.
        found = sorted((some for each in tiles for some in each.shared()), key=itemgetter(0))
        tensors, shared = [each.entry for each in said.values()], [some for _, some in found]
        return cls(len(held_by_rank), tensors, numbers, tiles, shared, ties)

    def replicas(self) -> list[dict[int, list[int]]]:
        """For each rank, the positions of the boxes that it must hold just as others do.

        They are grouped by the ranks that hold them: a group has the same number, and the same
        boxes in the same order, on each of its ranks.
        """
        numbers: dict[bytes, int] = {}
        # By who holds them: the same ranks in pairs are not the same as all of them together.
        together: dict[tuple[tuple[int, ...], bytes], list[Shared]] = {}
        ranks_of = {id(each.ranks): each.ranks for each in self.shared}  # of tensors cut alike one
        keys = {name: (ranks.shape, ranks.tobytes()) for name, ranks in ranks_of.items()}
        for shared in self.shared:
            together.setdefault(keys[id(shared.ranks)], []).append(shared)
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
                    # A new list, as several ranks have the ones that are there.
                    found[rank][number] = lists[mine] if before is None else before + lists[mine]
        return found


def _gather(held_by_rank: HeldByRank) -> tuple[dict[TensorKey, _Said], list[list[int]]]:
    """Return what was said of each tensor, and for each group the numbers of its tensors."""
    said: dict[TensorKey, _Said] = {}
    numbers: dict[TensorKey, int] = {}
    by_group = []
    for number, group in enumerate(held_by_rank.groups):
        rank = int(group.ranks[0])
        mine = []
        for position, (row, kind) in enumerate(zip(group.table.rows, _kinds(group), strict=True)):
            key = (row.part, row.name)
            known = said.get(key)
            if known is None:
                entry = TensorEntry(row.part, row.name, row.dtype, row.shape)
                known = said[key] = _Said(rank, entry, False, [], [])
                numbers[key] = len(numbers)
            elif row.dtype != known.entry.dtype or row.shape != known.entry.shape:
                raise _not_alike(known.first_rank, known.entry, rank, row)
            known.is_tied |= bool(row.tie)
            known.kinds.append((number, kind))
            known.at.append(position)
            mine.append(numbers[key])
        by_group.append(mine)
    return said, by_group


def _kinds(group: Alike) -> Iterator[int]:
    """Yield, for each box that ranks alike hold, a number that is equal for equal boxes."""
    known: dict[tuple[bytes, bool], int] = {}
    columns = group.table.columns
    for row, start, stop in zip(group.table.rows, columns, columns[1:], strict=False):
        boxes = group.numbers[:, start:stop].tobytes()
        yield known.setdefault((boxes, row.unequal), len(known))


def _tiles_of_all(groups: Sequence[Alike], said: Sequence[_Said]) -> list[Tiles]:
    """Return the boxes of all tensors, those that are cut alike together."""
    alike: dict[object, list[int]] = {}
    for number, each in enumerate(said):
        # By numbers and not by boxes: equal kinds in the same groups are equal boxes.
        key = (each.entry.dtype, each.entry.shape, *each.kinds)
        alike.setdefault(key, []).append(number)
    return [
        _tiles(
            groups,
            said[numbers[0]],
            np.array(numbers, np.int64),
            np.array([said[number].at for number in numbers], np.int64),
        )
        for numbers in alike.values()
    ]


def _tiles(groups: Sequence[Alike], said: _Said, tensors: Numbers, at: Numbers) -> Tiles:
    """Find the distinct boxes of tensors that are cut alike, and who holds each.

    Args:
        groups: of ranks alike.
        said: of the first of these tensors.
        tensors: the numbers of all of them.
        at: for each of them, where in what ranks hold its boxes are.
    """
    entry = said.entry
    ndim = len(entry.shape)
    of = said.boxes(groups)
    counts = [len(group.ranks) for group, _ in of]
    boxes = np.concatenate([np.hstack(group.boxes(position)) for group, position in of])
    ranks = np.concatenate([group.ranks for group, _ in of])
    places = np.repeat(np.arange(len(of)), counts)
    unequal = np.repeat([group.table.rows[position].unequal for group, position in of], counts)
    kept = np.arange(len(ranks))
    if len(of) > 1:
        # Ranks alike are in order by themselves, and not beside others.
        kept = np.lexsort((places, ranks))
    if all(entry.shape):  # without the empty shards of a tensor that has elements
        kept = kept[(boxes[kept, ndim:] > 0).all(axis=1)]
    else:
        # A tensor without elements is one chunk of its whole shape, however its nothing is cut.
        kept, unequal = kept[:1], np.zeros_like(unequal)
        boxes = np.array([[0] * ndim + list(entry.shape)] * len(boxes), np.int64)
    boxes, ranks, places = boxes[kept], ranks[kept], places[kept]
    numbers, examples = _distinct(boxes)
    # Stable, so that the holders of each box still ascend.
    order = np.argsort(numbers, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(examples)))])
    differing = np.zeros(len(examples), np.bool_)
    # Where one holder says so: the values of the others may differ from its own.
    differing[numbers[unequal[kept]]] = True
    starts, sizes = boxes[examples, :ndim], boxes[examples, ndim:]
    return Tiles(entry, tensors, starts, sizes, first, ranks[order], places[order], at, differing)


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
    # Before rows are sorted, which is slow: mostly they are equal, or one column tells them apart.
    if len(boxes) < 2 or (boxes == boxes[0]).all():
        return np.zeros(len(boxes), np.int64), np.arange(min(len(boxes), 1))
    if any(len(np.unique(column)) == len(boxes) for column in boxes.T):
        return np.arange(len(boxes)), np.arange(len(boxes))
    _, examples, numbers = np.unique(boxes, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(examples)
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    # Flat in any numpy: 2.0 gives the inverse another shape where there is an axis.
    return rank_of[numbers.reshape(-1)], examples[order]


def _ties(
    groups: Sequence[Alike], said: Mapping[TensorKey, _Said], tiles: Sequence[Tiles]
) -> dict[TensorKey, str]:
    """Find the tensors that are tied to one and the same other one wherever they are."""
    if not any(each.is_tied for each in said.values()):
        return {}
    keys = list(said)
    tiles_of = {keys[number]: each for each in tiles for number in each.tensors.tolist()}
    found: dict[TensorKey, str] = {}
    for key, each in said.items():
        if not each.is_tied:
            continue
        of = each.boxes(groups)
        # Who holds no element of it does not know whose memory it is.
        names = {group.table.rows[at].tie for group, at in of if group.has_some(at)}
        # Tied on some ranks only, or to several: it is written under its own name.
        if len(names) != 1 or "" in names:
            continue
        (other,) = names
        target = tiles_of.get((key[0], other))
        # The same boxes on the same ranks: where one rank has the other tensor alone, nobody has
        # said that its bytes are those of both.
        if target is not None and _places(target) == _places(tiles_of[key]):
            found[key] = other
    return found


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
