"""Reads ranges of a checkpoint by several threads: into memory, verified, and on to the targets."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.loading.filling import (
    SECTOR_BYTES,
    Column,
    Files,
    Ranges,
    ReadTarget,
    ReadTargets,
    Wanted,
    boxes_of,
)
from dist_ckpt.ranks.waiting import noted
from dist_ckpt.repository.source import Source
from dist_ckpt.staging.arena import Arena, aligned
from dist_ckpt.storage.base import Scatter
from dist_ckpt.threads import in_two_steps

Rule = Literal["auto", "always", "never"]
"""Whether ranks exchange what several of them want."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a store is read.

    Attributes:
        nbytes: what is read at once, at most.
        reads: how many reads go on at once.
        under_way: as many, or more: then reads go on while others are digested and copied.
    """

    nbytes: int
    reads: int
    under_way: int


# Each read is one request of the kernel. A few large ones keep a disk busy, and take little new
# memory and few turns from digests and copies (docs/design/006).
_DISK = Pace(8 << 20, reads=6, under_way=8)
# Each is one request over a network, which many at a time fill; small ones cost processor time.
REMOTE = Pace(16 << 20, reads=8, under_way=10)
"""How a store that is no disk of this host is read."""

# Of fewer bytes than this, a read goes through the page cache whatever it is aligned to.
_DIRECT_BYTES = 1 << 20

MAX_GAP_BYTES = 1 << 20
"""Over how many bytes at most that nobody wants a read goes on, inside of a file."""

# Bytes that nobody wants, inside of a chunk, above which they are stepped over.
_MAX_GAP_BYTES = 1 << 20

# Small reads are a matter of latency, which only many at a time can hide.
_SMALL_BYTES = 4 << 20
SMALL_READS = 8
"""How many small reads go on at once."""

# So many digest and copy faster than disks and networks of today deliver.
_MOST_COMPUTING = 4


def _pace(source: Source, in_flight_bytes: int) -> Pace:
    pace = _DISK if source.store.capabilities.direct_io else REMOTE
    return replace(pace, nbytes=min(pace.nbytes, in_flight_bytes // pace.under_way))


def warm_memory(source: Source, in_flight_bytes: int) -> BounceMemory:
    """Begin to make memory ready for reading as much as all of `source`; see `Fetcher`."""
    if not source.store.capabilities.direct_io:
        return BounceMemory()  # most goes straight to the targets
    pace = _pace(source, in_flight_bytes)
    return BounceMemory(min(pace.under_way * pace.nbytes, source.nbytes))


@dataclass(slots=True)
class Counts:
    """What one rank read and received, and how long each phase of that took.

    Attributes:
        read: bytes from storage.
        received: bytes from other ranks.
        seconds: by phase.
    """

    read: int = 0
    received: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count the time until the end of the context for `phase`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read.

    Attributes:
        verify: whether every byte is compared with its digest, where there are digests.
        exchange: whether ranks read what several of them want once, and send it to one another.
            "auto": where that saves more than a twentieth of all that is wanted. What it saves is
            work of the storage, which all ranks of all hosts share; what it costs is network, of
            which each host brings its own.
        in_flight_bytes: the most host memory to use at a time, above that of the targets.
        members: the ranks of the job in the default process group; None for all of it.
    """

    verify: bool = True
    exchange: Rule = "auto"
    in_flight_bytes: int = 256 << 20
    members: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What one rank is going to read.

    Attributes:
        files: gives the addresses.
        sizes: bytes of each file.
        filling: where the bytes go.
        fetcher: reads them.
    """

    files: Files
    sizes: Sequence[int]
    filling: ReadTargets
    fetcher: Fetcher


def plan_reading(
    source: Source,
    wanted: Sequence[Wanted],
    options: ReadOptions,
    *,
    memory: BounceMemory | None = None,
) -> ReadPlan:
    """Return how one rank reads what it wants; nothing is filled yet.

    Args:
        source: the checkpoint.
        wanted: boxes and their memory; it may be nothing.
        options: how to read.
        memory: for bytes under way, if some is being made ready already.

    Raises:
        IntegrityError: what describes the boxes is damaged or missing.
    """
    verify = options.verify and source.verified
    index = source.index_of(boxes_of(wanted))
    files = Files.of(index, apart_bytes=MAX_GAP_BYTES, verify=verify)
    gap_bytes = _MAX_GAP_BYTES if verify else SECTOR_BYTES
    filling = ReadTargets(index, wanted, files, max_gap_bytes=gap_bytes)
    fetcher = Fetcher(
        source,
        files,
        filling,
        verify=verify,
        in_flight_bytes=options.in_flight_bytes,
        memory=memory,
    )
    return ReadPlan(files, [file.nbytes for file in index.files], filling, fetcher)


def read_alone(
    source: Source, wanted: Sequence[Wanted], options: ReadOptions, *, label: str
) -> int:
    """Fill the memory of `wanted` on this rank, without a word to another; return the bytes read.

    Args:
        source: the checkpoint.
        wanted: boxes and their memory.
        options: how to read.
        label: what messages call this.

    Raises:
        CheckpointError: the memory may be half filled.
    """
    try:
        return plan_reading(source, wanted, options).fetcher.fetch_all()
    except Exception as error:
        noted(label, error)
        raise


class Fetcher:
    """What one rank reads of one checkpoint.

    Args:
        source: the checkpoint.
        files: gives the addresses; its units are the blocks where bytes are verified, its files
            begin at a multiple of `SECTOR_BYTES` and lie apart by `MAX_GAP_BYTES`.
        filling: takes the bytes.
        verify: whether to compare them with their digests.
        in_flight_bytes: the most memory for bytes that are under way.
        memory: that memory, if it is being made ready already.
    """

    def __init__(
        self,
        source: Source,
        files: Files,
        filling: ReadTargets,
        *,
        verify: bool,
        in_flight_bytes: int,
        memory: BounceMemory | None = None,
    ) -> None:
        self._source = source
        self._files = files
        self._filling = filling
        self._verify = verify
        self._in_flight_bytes = in_flight_bytes
        self._memory = memory
        self._pace = _pace(source, in_flight_bytes)
        # Reads have less than a unit more, and never less than one, which is what can be verified.
        self._read_bytes = max(self._pace.nbytes - files.largest_unit, files.largest_unit)

    def fetch_all(self) -> int:
        """Read all that the filling needs and check that it is filled; return the bytes read."""
        nbytes = self.fetch(self._filling.needs)
        self._filling.check_filled()
        return nbytes

    def fetch(self, ranges: Ranges, *, max_gap_bytes: int = MAX_GAP_BYTES) -> int:
        """Read `ranges`, whole units, and fill the targets with them; return the bytes read.

        What lies in gaps of up to `max_gap_bytes` is read, and filled in, too.
        """
        bridged = bridge(ranges, max_gap_bytes=max_gap_bytes)
        reads = cut(bridged, most_bytes=self._read_bytes, begin=self._files.begin)
        if not len(reads):
            return 0
        # With room for the rest of the sectors that a disk reads whole.
        largest = int((reads.stop - reads.start).max()) + 2 * SECTOR_BYTES
        at_once, under_way = self._share_out(reads.nbytes, len(reads), largest=largest)
        devices = self._filling.devices
        buffers = BounceBuffers(under_way, largest, devices=devices, memory=self._memory)

        def read(span: tuple[int, int]) -> tuple[BounceBuffer, list[ReadTarget]]:
            start, stop = span
            # Before the read: how much is under way is bounded by the memory there is for it.
            buffer = buffers.take()
            skip = start % SECTOR_BYTES
            landings = self._land(start, buffer.memory[skip : skip + stop - start])
            self._read(start, [landing.view for landing in landings], pages=buffer.memory)
            return buffer, landings

        def finish(done: tuple[BounceBuffer, list[ReadTarget]]) -> None:
            buffer, landings = done
            with buffers.using(buffer):
                self._compare(landings[0].address, [landing.view for landing in landings])
                for landing in landings:
                    self._filling.settle(landing)

        in_two_steps(
            read,
            finish,
            reads.pairs(),
            firsts=at_once,
            seconds=_computing(),
            under_way=under_way,
        )
        return bridged.nbytes

    def fetch_into(self, reads: Sequence[tuple[int, int, memoryview]]) -> int:
        """Read whole units, each to pages of its own; return the bytes read.

        Args:
            reads: address, bytes, and the pages: as far into the first one as the address is.
        """
        nbytes = sum(count for _, count, _ in reads)
        if not reads:
            return 0
        at_once, under_way = self._share_out(nbytes, len(reads), largest=0)

        def read(each: tuple[int, int, memoryview]) -> tuple[int, memoryview]:
            address, count, pages = each
            skip = address % SECTOR_BYTES
            view = pages[skip : skip + count]
            self._read(address, [view], pages=pages)
            return address, view

        in_two_steps(
            read,
            lambda each: self._compare(each[0], [each[1]]),
            reads,
            firsts=at_once,
            seconds=_computing(),
            under_way=under_way,
        )
        return nbytes

    def _share_out(self, nbytes: int, count: int, *, largest: int) -> tuple[int, int]:
        """Return how many of `count` reads go on at once, and how many are under way.

        Args:
            nbytes: of all reads together.
            count: at least one.
            largest: bytes of memory that each takes until its bytes are where they belong.
        """
        reads, under_way = self._pace.reads, self._pace.under_way
        if nbytes // count <= _SMALL_BYTES:
            reads = max(reads, SMALL_READS)
            under_way = max(under_way, reads + _computing())
        # No more memory than was made ready, and is kept, for reads of full size.
        full_bytes = self._read_bytes + self._files.largest_unit + 2 * SECTOR_BYTES
        most_bytes = min(self._in_flight_bytes, self._pace.under_way * full_bytes)
        fitting = most_bytes // max(largest, 1)
        return reads, max(1, min(under_way, fitting, count))

    def _land(self, start: int, bounce: memoryview) -> list[ReadTarget]:
        # A disk reads to whole sectors of memory only, which tensors hardly ever begin at.
        if self._source.store.capabilities.direct_io:
            return [ReadTarget(start, bounce)]
        return self._filling.land(start, bounce)

    def _read(self, address: int, views: Sequence[memoryview], *, pages: memoryview) -> None:
        """Fill `views`, or `pages` that the one view lies in, where whole sectors are faster."""
        file, offset = self._files.place(address)
        with self._naming(address, views):
            nbytes = sum(map(len, views))
            if nbytes < _DIRECT_BYTES or not self._source.store.capabilities.direct_io:
                self._source.read_into(file, offset, *views)
                return
            skip = offset % SECTOR_BYTES
            end = min(offset + nbytes + -(offset + nbytes) % SECTOR_BYTES, self._files.size(file))
            self._source.read_into(file, offset - skip, pages[: end - offset + skip])

    def _compare(self, address: int, views: Sequence[memoryview]) -> None:
        if self._verify:
            file, offset = self._files.place(address)
            with self._naming(address, views):
                self._source.compare(file, offset, *views)

    @contextmanager
    def _naming(self, address: int, views: Sequence[memoryview]) -> Iterator[None]:
        """Add to an `IntegrityError` about a read which tensors it is about."""
        try:
            yield
        except IntegrityError as error:
            names = self._damaged(address, Scatter(views))
            if not names:
                raise
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise IntegrityError(
                f"{error.message}. It holds bytes of {shown}", kind=error.kind, ranks=error.ranks
            ) from error

    def _damaged(self, address: int, into: Scatter) -> list[str]:
        """Return the names of the tensors in the first unit that cannot be read."""
        file, offset = self._files.place(address)
        # Read once more, unit by unit: a comparison of all says only that one of them is wrong.
        for begin, end in self._files.units(address, address + into.nbytes):
            start, stop = begin - address, end - address
            views = into.cut(start, stop)
            try:
                self._source.read_into(file, offset + start, *views)
                if self._verify:
                    self._source.compare(file, offset + start, *views)
            except IntegrityError as error:
                if error.kind == ErrorKind.DIGEST:
                    return self._filling.names_in(address + start, address + stop)
                break
        # A whole file is missing or short, or the damage was in the way and not in the file.
        return self._filling.names_in(address, address + into.nbytes)


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


def cut(
    ranges: Ranges, *, most_bytes: int, begin: Callable[[Column], Column] = lambda at: at
) -> Ranges:
    """Cut the ranges at every multiple of `most_bytes`, so that none has more.

    The places do not depend on where a range begins: two ranks that cut what they have in common
    do it at the same places.

    Args:
        ranges: sorted and disjoint.
        most_bytes: where to cut.
        begin: `Files.begin`, to cut where units begin: then a range may have a unit more.
    """
    first, stop = ranges.start // most_bytes, -(-ranges.stop // most_bytes)
    counts = stop - first
    owner = np.repeat(np.arange(len(ranges)), counts)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner]
    edge, next_edge = begin(step * most_bytes), begin((step + 1) * most_bytes)
    # Only what lies inside of a range is sure to be in a unit.
    starts = np.where(step == first[owner], ranges.start[owner], edge)
    stops = np.where(step + 1 == stop[owner], ranges.stop[owner], next_edge)
    some = starts < stops
    return Ranges(np.maximum(starts, ranges.start[owner])[some], stops[some])


def _computing() -> int:
    """Return how many threads digest and copy at once."""
    # More than there are processors would only get in each other's way.
    affinity = getattr(os, "sched_getaffinity", None)  # unknown to some systems
    return min(_MOST_COMPUTING, len(affinity(0)) if affinity else os.cpu_count() or 1)


# Bounce buffers: aligned host memory that bytes pass through on their way to tensors.


KEPT_BYTES = 64 << 20
"""How much memory a process keeps for its next load, at most."""

kept_memory: list[Arena] = []
"""What is kept for the next load: one at most."""


class BounceMemory:
    """Memory for bounce buffers, touched in the background from the moment this is made.

    A new page costs the kernel more than reading into it: where a reader is going to be busy with
    something else for a while, its memory is made ready meanwhile. And what was used up to the end
    of the context is kept for the next one of this process: up to 64 MiB.

    Args:
        nbytes: a guess of how much it will be; 0 if it may be none.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._arena = _taken() if nbytes else Arena()
        if nbytes:
            self._arena.prewarm(nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        # After a failure something given up may still write to it: then nobody else may use it.
        if failed is None and 0 < self._arena.capacity_bytes <= KEPT_BYTES:
            self._arena.reset(self._arena.capacity_bytes)  # nobody touches it any more
            kept_memory[:] = [self._arena]
            self._arena = Arena()
        self.release()

    def release(self) -> None:
        """Give the memory back, as soon as nobody looks at its buffers any more."""
        self._arena.release()

    def cut(self, count: int, nbytes: int) -> list[memoryview]:
        """Return `count` buffers of `nbytes`, each from a page on; those of before are void."""
        self._arena.reset(count * aligned(nbytes))
        return [self._arena.take(nbytes) for _ in range(count)]


def _taken() -> Arena:
    try:
        return kept_memory.pop()  # atomic: of two loads at once one gets it
    except IndexError:
        return Arena()


@dataclass(frozen=True, slots=True)
class BounceBuffer:
    """Memory to read to, and the streams of the GPUs by which it is copied on.

    Attributes:
        memory: begins on a page.
        streams: one for each GPU; none where bytes go to host memory only.
    """

    memory: memoryview
    streams: Sequence[torch.cuda.Stream]


class BounceBuffers:
    """A few buffers that are borrowed in turn; only their first use pays for the memory.

    One thread may fill a buffer and another one empty it. Where bytes go on to a GPU the memory is
    pinned, and they go by a stream beside that of the training, so that copies run along with
    reads.

    Args:
        count: how many buffers there are.
        nbytes: the size of each; it begins on a page.
        devices: where bytes may go on to.
        memory: what to make them of, if they need not be pinned; None for memory of their own.
    """

    def __init__(
        self,
        count: int,
        nbytes: int,
        *,
        devices: Sequence[torch.device],
        memory: BounceMemory | None = None,
    ) -> None:
        gpus = [device for device in devices if device.type == "cuda"]
        self._free: queue.SimpleQueue[BounceBuffer] = queue.SimpleQueue()
        buffers = None if gpus else (memory or BounceMemory()).cut(count, nbytes)
        for number in range(count):
            streams = [torch.cuda.Stream(device) for device in gpus]  # type: ignore[no-untyped-call]
            for stream in streams:
                # What the training still does to a target is over before bytes get there.
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            view = _pinned(nbytes) if buffers is None else buffers[number]
            self._free.put(BounceBuffer(view, streams))

    def take(self) -> BounceBuffer:
        """Borrow a buffer, which `using` gives back; waits while all are lent."""
        return self._free.get()

    @contextmanager
    def using(self, buffer: BounceBuffer) -> Iterator[None]:
        """Copy out of `buffer` inside of this: copies begun here are over when it is given back."""
        try:
            with ExitStack() as stack:
                for stream in buffer.streams:
                    stack.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            for stream in buffer.streams:
                # The next borrower writes to this memory: no copy may still read from it.
                stream.synchronize()
            self._free.put(buffer)


def _pinned(nbytes: int) -> memoryview:
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    view: memoryview = memory.numpy().data
    return view
