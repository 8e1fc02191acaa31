"""What the ranks of a job hold, as columns: names once for ranks alike, numbers for the rest.

At thousands of ranks an object for each box of each rank is most of what a plan costs. Ranks that
hold the same tensors share one table of them, and differ in numbers only: where their boxes start,
and how large these are. A rank sends the digest of its table, and the table itself only if nobody
else does. Its numbers travel shape by shape, each as the step from the one before: of tensors of
one shape a rank mostly has the same box, so nearly all of them are 0, and deflated to nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CoordinationError
from dist_ckpt.format.index import Held

Numbers = NDArray[np.int64]

_BYTES = 8
_SIGN = 63  # the bit that says it
_SIDES = 2  # between which the runs of `pack_runs` go to and fro


@decodable
class Row(msgspec.Struct, frozen=True, array_like=True):
    """All of a `Held` but where its box is: equal on all ranks of one layout."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    unequal: bool
    tie: str


@dataclass(frozen=True)
class Table:
    """The tensors that a rank holds boxes of, in the order of the boxes."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, held: Sequence[Held]) -> Table:
        """Return the table of what a rank holds."""
        return cls(tuple(Row(h.part, h.name, h.dtype, h.shape, h.unequal, h.tie) for h in held))

    @classmethod
    def decode(cls, data: bytes) -> Table:
        """Return the table that travelled as `data`."""
        return cls(msgspec.msgpack.decode(data, type=tuple[Row, ...]))

    def encode(self) -> bytes:
        """Return the table as it travels."""
        return msgspec.msgpack.encode(self.rows)

    @cached_property
    def columns(self) -> list[int]:
        """For each row the column where its numbers begin, and the number of all columns."""
        columns: list[int] = self.starts.tolist()
        return columns

    @cached_property
    def starts(self) -> Numbers:
        """The same, as int64[rows + 1]."""
        return np.cumsum([0, *(2 * len(row.shape) for row in self.rows)], dtype=np.int64)

    @cached_property
    def _order(self) -> Numbers:
        """All columns, those next to one another that have the same say of boxes of one shape."""
        found = [
            np.add.outer(np.arange(2 * len(shape)), self.starts[positions]).ravel()
            for shape, positions in _by_shape(row.shape for row in self.rows).items()
        ]
        return np.concatenate([np.zeros(0, np.int64), *found])

    @cached_property
    def places(self) -> Numbers:
        """For each row where it stands once they are ordered as `shape_order` does."""
        order = shape_order(row.shape for row in self.rows)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return places

    def pack(self, numbers: Numbers) -> bytes:
        """Return the numbers of a rank that holds these tensors, as they travel."""
        return pack_numbers(steps_of(numbers[self._order]))

    def unpack(self, data: bytes) -> Numbers:
        """Return the numbers that `pack` made `data` of.

        Raises:
            CoordinationError: they are not those of these tensors.
        """
        numbers = np.empty(len(self._order), np.int64)
        numbers[self._order] = np.cumsum(unpack_numbers(data, count=len(numbers)))
        return numbers

    def held(self, numbers: Numbers) -> list[Held]:
        """Return what a rank with these numbers holds."""
        flat, held = numbers.tolist(), []
        for row, start in zip(self.rows, self.columns, strict=False):
            middle = start + len(row.shape)
            offsets, sizes = flat[start:middle], flat[middle : middle + len(row.shape)]
            held.append(
                Held(
                    row.part,
                    row.name,
                    row.dtype,
                    row.shape,
                    tuple(offsets),
                    tuple(sizes),
                    row.unequal,
                    row.tie,
                )
            )
        return held


@dataclass(frozen=True)
class Alike:
    """Ranks that hold boxes of the same tensors.

    Attributes:
        table: which tensors.
        ranks: int64[r], ascending.
        numbers: int64[r, table.columns[-1]]: for each rank, row after row, the offsets of its box
            and then its sizes.
    """

    table: Table
    ranks: Numbers
    numbers: Numbers

    def boxes(self, position: int) -> tuple[Numbers, Numbers]:
        """Return the offsets and the sizes, int64[r, d] each, of the box at `position`."""
        start, stop = self.table.columns[position], self.table.columns[position + 1]
        middle = (start + stop) // 2
        return self.numbers[:, start:middle], self.numbers[:, middle:stop]

    def has_some(self, position: int) -> bool:
        """Tell whether some rank has an element of the box at `position`."""
        return bool((self.boxes(position)[1] > 0).all(axis=1).any())


@dataclass(frozen=True)
class HeldByRank(Sequence[list[Held]]):
    """What each rank of a job holds; as a sequence, the boxes of one rank at a time.

    Attributes:
        groups: the ranks by what they hold, in the order of their first ranks.
    """

    groups: Sequence[Alike]
    _places: dict[int, tuple[Alike, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places = {
            rank: (group, row)
            for group in self.groups
            for row, rank in enumerate(group.ranks.tolist())
        }
        object.__setattr__(self, "_places", places)

    @classmethod
    def of(cls, held_by_rank: Sequence[Sequence[Held]]) -> HeldByRank:
        """Put together what ranks hold."""
        tables = [Table.of(held) for held in held_by_rank]
        return cls.joined(tables, lambda rank: numbers_of(held_by_rank[rank]))

    @classmethod
    def joined(cls, tables: Sequence[Table], numbers: Callable[[int], Numbers]) -> HeldByRank:
        """Put together what ranks hold.

        Args:
            tables: of each rank.
            numbers: returns those of a rank; asked once, one rank at a time, so that the numbers of
                all are never in memory twice.
        """
        alike: dict[int, list[int]] = {}
        distinct: dict[Table, int] = {}
        known: dict[int, int] = {}  # by identity: ranks alike mostly have one object
        for rank, table in enumerate(tables):
            if (number := known.get(id(table))) is None:
                number = known[id(table)] = distinct.setdefault(table, len(distinct))
            alike.setdefault(number, []).append(rank)
        groups = []
        for ranks in alike.values():
            table = tables[ranks[0]]
            rows = np.empty((len(ranks), table.columns[-1]), np.int64)
            # Straight to their place: a list of all would have them in memory twice.
            for row, rank in zip(rows, ranks, strict=True):
                row[:] = numbers(rank)
            groups.append(Alike(table, np.array(ranks, np.int64), rows))
        return cls(groups)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, rank: int) -> tuple[Table, Numbers]:
        """Return which tensors `rank` holds, and its numbers."""
        group, row = self._places[rank]
        return group.table, group.numbers[row]

    @overload
    def __getitem__(self, rank: int) -> list[Held]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[list[Held]]: ...
    def __getitem__(self, rank: int | slice) -> list[Held] | list[list[Held]]:
        if isinstance(rank, slice):
            return [self[one] for one in range(len(self))[rank]]
        group, row = self._places[range(len(self))[rank]]
        return group.table.held(group.numbers[row])

    def __iter__(self) -> Iterator[list[Held]]:
        return (self[rank] for rank in range(len(self)))

    def counts(self) -> Numbers:
        """Return, int64[ranks], how many boxes each rank holds."""
        counts = np.zeros(len(self), np.int64)
        for group in self.groups:
            counts[group.ranks] = len(group.table.rows)
        return counts


def numbers_of(held: Sequence[Held]) -> Numbers:
    """Return the numbers of a rank: the offsets and the sizes of each box, one after the other."""
    return np.fromiter(chain.from_iterable((*h.offsets, *h.sizes) for h in held), np.int64)


def shape_order(shapes: Iterable[tuple[int, ...]]) -> Numbers:
    """Return the positions of boxes in another order: those in tensors of one shape together."""
    # With one of no numbers in front, as numpy cannot join nothing.
    return np.concatenate([np.zeros(0, np.int64), *_by_shape(shapes).values()])


def _by_shape(shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Numbers]:
    found: dict[tuple[int, ...], list[int]] = {}
    for position, shape in enumerate(shapes):
        found.setdefault(shape, []).append(position)
    return {shape: np.array(positions, np.int64) for shape, positions in found.items()}


def pack_numbers(numbers: Numbers) -> bytes:
    """Return numbers as they travel: the lowest bytes of all, then the next, deflated.

    The sign becomes the lowest bit, so that the high bytes of small numbers are 0 whichever it is.
    Bytes that are 0 in all of them are left out; the first byte says how many are not.
    """
    signed = np.asarray(numbers, np.int64)
    # The second shift carries the sign on, and so turns all bits of a negative number over.
    unsigned = ((signed << 1) ^ (signed >> _SIGN)).view(np.uint64)
    width = max(1, (int(unsigned.max(initial=0)).bit_length() + 7) // 8)
    by_number = unsigned.astype("<u8").view(np.uint8).reshape(-1, _BYTES)
    return bytes([width]) + zlib.compress(by_number[:, :width].T.tobytes())


def unpack_numbers(data: bytes, *, count: int | None = None, most: int | None = None) -> Numbers:
    """Return the numbers that travelled as `data`.

    Args:
        data: what `pack_numbers` made.
        count: how many they are; None if that is not known.
        most: how many there can be; None for any number, or where `count` says it.

    Raises:
        CoordinationError: they are not so many.
    """
    width = data[0] if data else 0
    # Another rank sent it, which may run another version.
    if not 1 <= width <= _BYTES:
        raise _not_numbers(f"{width} bytes each")
    unpacker = zlib.decompressobj()
    limit = most if count is None else count
    try:
        # One byte more than is wanted, so that no other number of them is taken for it.
        raw = unpacker.decompress(data[1:], 0 if limit is None else width * limit + 1)
    except zlib.error as error:
        raise _not_numbers(str(error)) from error
    is_whole = unpacker.eof and not len(raw) % width
    is_short = count is not None and len(raw) < width * count
    is_long = limit is not None and len(raw) > width * limit
    if not is_whole or is_short or is_long:
        raise _not_numbers(f"{len(raw)} bytes, not {limit} numbers of {width}")
    by_byte = np.frombuffer(raw, np.uint8).reshape(width, -1)
    by_number = np.zeros((by_byte.shape[1], _BYTES), np.uint8)
    by_number[:, :width] = by_byte.T
    unsigned = by_number.view("<u8").reshape(-1).astype(np.uint64, copy=False)
    numbers: Numbers = (unsigned >> 1).view(np.int64) ^ -(unsigned & 1).view(np.int64)
    return numbers


def steps_of(numbers: Numbers) -> Numbers:
    """Return how far each number is from the one before, the first one from 0."""
    return np.diff(numbers, prepend=np.int64(0))


def pack_runs(numbers: Sequence[int] | Numbers) -> bytes:
    """Return numbers that mostly ascend by one, as they travel: as runs, deflated to nothing.

    Of each run travels how far it begins behind the end of the last but one, and how long it is. A
    rank that has some of the experts of each layer goes to and fro between what all hold and what
    few do: either side is as regular as the layers are, the way from one to the other never.
    """
    every = np.asarray(numbers, np.int64)
    # Two less than the first, so that a run begins there.
    first = np.flatnonzero(np.diff(every, prepend=every[:1] - 2) != 1)
    starts, lengths = every[first], np.diff(first, append=len(every))
    before = np.concatenate([np.zeros(_SIDES, np.int64), starts + lengths])[: len(starts)]
    return pack_numbers(np.concatenate([starts - before, lengths]))


def unpack_runs(data: bytes, *, most: int) -> list[int]:
    """Return the numbers that `pack_runs` made `data` of.

    Args:
        data: as they travelled.
        most: how many there can be: a run says in a few bytes how long it is.

    Raises:
        CoordinationError: there are more, or it is nothing that `pack_runs` made.
    """
    # Two numbers tell a run, and there are no more runs than numbers.
    told = unpack_numbers(data, most=2 * most)
    if len(told) % 2:
        raise _not_numbers(f"{len(told)} of them, no pairs")
    distances, lengths = told.reshape(2, -1)
    # Each of them first, or their sum could be too large to be seen.
    if ((lengths < 1) | (lengths > most)).any() or lengths.sum() > most:
        raise _not_numbers(f"more than {most}")
    ends = distances + lengths
    for side in range(_SIDES):
        # Each side goes on from its own last run, as `pack_runs` told it.
        ends[side::_SIDES] = np.cumsum(ends[side::_SIDES])
    # From each run on, what a number is more than its place among all.
    ahead = ends - np.cumsum(lengths)
    numbers: list[int] = (np.repeat(ahead, lengths) + np.arange(lengths.sum())).tolist()
    return numbers


def _not_numbers(why: str) -> CoordinationError:
    return CoordinationError(
        f"numbers of boxes came that cannot be read ({why}): run one version of dist_ckpt on all "
        "ranks"
    )
