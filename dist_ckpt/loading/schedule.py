"""Who reads what, when several ranks want the same bytes. Pure, and the same on every rank.

Ranks with equal needs form a group: the replicas of DDP are one group, HSDP has one for each
shard. What one rank alone needs it reads by itself, without a word to the others. What several
need is cut into extents. One rank of those that need an extent reads it and sends it to the
others, in windows: in each of them a rank holds a bounded number of bytes. Where not every rank
can read every file, one that can reads also for those that cannot.
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
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.loading.filling import Files, Ranges, merge_ranges

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
    # In one order of bytes, as hosts compare it with one another.
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
            # Not in windows: nobody waits for it, and it needs no memory that is shared out.
            private[groups[0]].append((start, stop))
        else:
            common.append((start, stop, groups))
    alone = tuple(_ranges(private[group]) for group in group_of)
    # From what each reads for itself on, so that all of it together comes out even.
    readers = _Readers(members, [each.nbytes for each in alone])
    windows = _Windows(len(needs), window_bytes)
    for start, stop, groups in common:
        ranks = tuple(sorted(rank for group in groups for rank in members[group]))
        if can_read is None:
            reader = readers.take(groups, stop - start)
        else:
            able = can_read(start)
            reader = readers.take_of([rank for rank in ranks if rank in able] or able, stop - start)
        # Nobody who needs it can: it reads what its own tensors have no place for.
        if reader not in ranks:
            holders = tuple(sorted((*ranks, reader)))
            extent = Extent(start, stop, reader, holders, passes_on=True)
            # It holds the extent as well, so there has to be room on it, too.
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
        # The lower rank of two equal ones, as all ranks have to come to the same.
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
        # No group goes back to an earlier window, so ranks come through them in one order.
        window = max(self._window[group] for group in groups)
        used = max(self._used[group] for group in groups if self._window[group] == window)
        # One that is larger than a window has a window for itself: it is not cut here.
        if used and used + nbytes > self._most:
            window += 1
        for group in groups:
            if self._window[group] != window:
                self._window[group], self._used[group] = window, 0
            self._used[group] += nbytes
        self.extents += [[] for _ in range(window + 1 - len(self.extents))]
        # In a window one rank may send another several: by this tag each finds its memory.
        self.extents[window].append(replace(extent, tag=len(self.extents[window])))
