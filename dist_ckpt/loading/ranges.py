"""Ranges of bytes of many files, as columns: widened, joined, and cut. Pure.

All files of a checkpoint are thought of as lying in one row, each from a multiple of `unit_bytes`
on and never touching the one before it. A place in this row is an *address*: then a range is two
numbers, and what is true of neighbours in one file needs no look at which file it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.errors import UsageError

Column = NDArray[np.int64]

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
        unit_bytes: what reads are made of: digest blocks, sectors, or single bytes.
        apart_bytes: how many addresses lie between two files besides: as many as the gaps have
            that are to be bridged.

    Raises:
        UsageError: a size or the unit is out of range, or there are more bytes than addresses.
    """

    def __init__(self, sizes: Sequence[int], *, unit_bytes: int, apart_bytes: int = 0) -> None:
        if unit_bytes < 1 or apart_bytes < 0 or any(size < 0 for size in sizes):
            raise UsageError(f"bad sizes: unit_bytes={unit_bytes}, files of {min(sizes)} bytes")
        # In Python integers: what an index claims may be more than int64 holds.
        apart = 1 + -(-apart_bytes // unit_bytes)
        if sum(sizes) + (1 + apart) * unit_bytes * (len(sizes) + 1) > _ADDRESS_LIMIT:
            raise UsageError(f"{len(sizes)} files claim more bytes than a load can address")
        self.unit_bytes = unit_bytes
        self._sizes = np.array(sizes, np.int64)
        # More units than it has, so that the end of a file never touches the next one, and no read
        # that goes on over a gap leaves its file.
        units = -(-self._sizes // unit_bytes) + apart
        self._base = np.concatenate([[0], np.cumsum(units * unit_bytes)]).astype(np.int64)

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
        unit = self.unit_bytes
        file = np.searchsorted(self._base, ranges.start, side="right") - 1
        end = self._base[file] + self._sizes[file]
        return Ranges(ranges.start // unit * unit, np.minimum(-(-ranges.stop // unit) * unit, end))


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


def cut(ranges: Ranges, *, most_bytes: int) -> Ranges:
    """Cut the ranges at every multiple of `most_bytes`, so that none has more.

    The places do not depend on where a range begins: two ranks that cut what they have in common
    do it at the same places.
    """
    first = ranges.start // most_bytes
    counts = -(-ranges.stop // most_bytes) - first
    owner = np.repeat(np.arange(len(ranges)), counts)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner]
    return Ranges(
        np.maximum(ranges.start[owner], step * most_bytes),
        np.minimum(ranges.stop[owner], (step + 1) * most_bytes),
    )
