"""Bytes from rank to rank, over a process group that a load has for itself."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from dist_ckpt.errors import CoordinationError, ErrorKind, describe
from dist_ckpt.loading.ranges import Ranges, merge_ranges
from dist_ckpt.ranks.rounds import Deadline

# Who reads what, when several ranks want the same bytes. Pure, and the same on every rank.
#
# Ranks with equal needs form a group: the replicas of DDP are one group, HSDP has one for each
# shard. What one rank alone needs it reads by itself, without a word to the others. What several
# need is cut into extents. One rank of those that need an extent reads it and sends it to the
# others, in windows: in each of them a rank holds a bounded number of bytes.


PAGE_BYTES = 4096
"""Each extent has pages of a window's memory to itself, where a disk can read into it directly."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of addresses that one rank reads for several.

    Attributes:
        start: the first address.
        stop: the one behind the last.
        reader: the rank that reads it.
        ranks: those that need it, the reader included.
        tag: tells it from the other extents of its window.
    """

    start: int
    stop: int
    reader: int
    ranks: tuple[int, ...]
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


def cost(needs: Sequence[Ranges], group_of: Sequence[int]) -> tuple[int, int]:
    """Return the bytes read when each rank reads what it needs, and when each is read once.

    Args:
        needs: of each group, sorted and disjoint.
        group_of: for each rank, the number of its group.
    """
    apart = sum(needs[group].nbytes for group in group_of)
    start = np.concatenate([each.start for each in needs])
    stop = np.concatenate([each.stop for each in needs])
    return apart, merge_ranges(Ranges(start, stop)).nbytes


def share(needs: Sequence[Ranges], group_of: Sequence[int], *, window_bytes: int) -> ReadSchedule:
    """Decide who reads what.

    Each rank reads about the same number of bytes, as far as it needs any that others need too.

    Args:
        needs: of each group, sorted and disjoint, whole units, and cut into what an extent may
            have: at the same places by all that need what lies there.
        group_of: for each rank, the number of its group.
        window_bytes: the most that a rank holds in a window, if an extent is no more.
    """
    members: list[list[int]] = [[] for _ in needs]
    for rank, group in enumerate(group_of):
        members[group].append(rank)
    private: list[list[tuple[int, int]]] = [[] for _ in needs]
    common: list[tuple[int, int, tuple[int, ...]]] = []
    for start, stop, groups in _overlay(needs):
        if len(groups) == 1 and len(members[groups[0]]) == 1:
            private[groups[0]].append((start, stop))
        else:
            common.append((start, stop, groups))
    alone = tuple(_ranges(private[group]) for group in group_of)
    readers = _Readers(members, [each.nbytes for each in alone])
    windows = _Windows(len(needs), window_bytes)
    for start, stop, groups in common:
        ranks = tuple(sorted(rank for group in groups for rank in members[group]))
        reader = readers.take(groups, stop - start)
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


class _Windows:
    """Puts each extent into the first window in which every group that needs it has room."""

    def __init__(self, groups: int, most: int) -> None:
        self._most = most
        self._window = [0] * groups
        self._used = [0] * groups
        self.extents: list[list[Extent]] = []

    def add(self, extent: Extent, groups: Sequence[int]) -> None:
        nbytes = place_extents([extent])[-1]
        window = max(self._window[group] for group in groups)
        used = max(self._used[group] for group in groups if self._window[group] == window)
        if used and used + nbytes > self._most:
            window += 1
        for group in groups:
            if self._window[group] != window:
                self._window[group], self._used[group] = window, 0
            self._used[group] += nbytes
        self.extents += [[] for _ in range(window + 1 - len(self.extents))]
        self.extents[window].append(replace(extent, tag=len(self.extents[window])))


_MIN_SECONDS = 1.0


@contextmanager
def private_group(
    deadline: Deadline, members: Sequence[int] | None = None
) -> Iterator[dist.ProcessGroup]:
    """Make a group of the ranks of a job that nothing else uses; it is gone again at the end.

    A collective call, on the thread that also makes the training's collectives. When the body is
    left, no rank may still wait for another.

    Args:
        deadline: when to give up.
        members: the ranks of the job in the default group; None for all.

    Raises:
        CoordinationError: some rank did not come in time.
    """
    # Gloo gives up by itself at this point, so that no wait outlives the deadline.
    seconds = max(deadline.remaining_seconds, _MIN_SECONDS)
    try:
        # The other ranks of the default group, if there are any, do not know of this.
        group = dist.new_group(
            None if members is None else list(members),
            backend="gloo",
            timeout=timedelta(seconds=seconds),
            use_local_synchronization=members is not None,
        )
    except Exception as error:  # c10d raises whatever its backends do
        raise CoordinationError(
            f"the ranks could not connect to exchange what they read: {describe(error)}; can each "
            "host reach the others by the interface of GLOO_SOCKET_IFNAME?",
            kind=ErrorKind.PEER_ABSENT,
        ) from error
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def swap(
    group: dist.ProcessGroup, rank: int, extents: Sequence[Extent], memory: Sequence[memoryview]
) -> int:
    """Send what this rank has read of `extents`, receive the rest; return the bytes received.

    Args:
        group: from `private_group`.
        rank: this rank.
        extents: those of a window that this rank needs, the same order on all of its ranks.
        memory: for each of `extents`, its bytes or the memory for them.

    Raises:
        CoordinationError: a peer is gone or did not answer in time; `ranks` names it.
    """
    works: list[tuple[int, dist.Work | None]] = []
    failed: dict[int, str] = {}
    received = 0
    for extent, data in zip(extents, memory, strict=True):
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        peers = [each for each in extent.ranks if each != rank]
        try:
            if extent.reader != rank:
                peers = [extent.reader]
                work = dist.irecv(tensor, group=group, tag=extent.tag, group_src=peers[0])
                works.append((peers[0], work))
                received += extent.nbytes
            else:
                works += [
                    (to, dist.isend(tensor, group=group, tag=extent.tag, group_dst=to))
                    for to in peers
                ]
        except RuntimeError as error:
            failed.setdefault(peers[0], describe(error))
    # All of them are waited for, also after a failure: who is well gets and gives what it should,
    # so that only the one that is gone is named, and nobody's memory is still written to.
    for peer, work in works:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            failed.setdefault(peer, describe(error))
    if failed:
        names = ", ".join(map(str, sorted(failed)))
        raise CoordinationError(
            f"the connection to rank {names} was lost while bytes were exchanged: it probably died",
            kind=ErrorKind.PEER_ABSENT,
            ranks=failed,
        )
    return received
