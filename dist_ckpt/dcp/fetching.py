"""Reads ranges of a checkpoint by several threads: into memory, verified, and on to the targets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_ckpt.dcp.filling import Filling, Landing
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.repository.source import Source
from dist_ckpt.staging.bounce import BounceBuffers, BounceMemory
from dist_ckpt.storage.parallel import in_parallel
from dist_ckpt.storage.ranges import Files, Ranges, bridge, cut
from dist_ckpt.storage.scatter import Scatter


@dataclass(frozen=True, slots=True)
class _Pace:
    """How a store is read.

    Attributes:
        nbytes: what is read at once, at most.
        reads: how many reads are under way.
        threads: as many, or more: then reading goes on while some digest and copy.
    """

    nbytes: int
    reads: int
    threads: int


# Each read is one request of the kernel. A few large ones keep a disk busy, and take little new
# memory and few turns from digests and copies (docs/design/006).
_DISK = _Pace(8 << 20, reads=6, threads=8)
# Each is one request over a network, which many at a time fill; small ones cost processor time.
_REMOTE = _Pace(16 << 20, reads=8, threads=8)

MAX_GAP_BYTES = 1 << 20
"""Over how many bytes at most that nobody wants a read goes on, inside of a file."""

# Small reads are a matter of latency, which only many at a time can hide.
_SMALL_BYTES, _SMALL_READS = 4 << 20, 8


def _pace(source: Source, in_flight_bytes: int) -> _Pace:
    pace = _DISK if source.store.capabilities.direct_io else _REMOTE
    return replace(pace, nbytes=min(pace.nbytes, in_flight_bytes // pace.threads))


def warm_memory(source: Source, in_flight_bytes: int) -> BounceMemory:
    """Begin to make memory ready for reading as much as all of `source`; see `Fetcher`."""
    if not source.store.capabilities.direct_io:
        return BounceMemory()  # most goes straight to the targets
    pace = _pace(source, in_flight_bytes)
    nbytes = sum(file.nbytes for file in source.index.files)
    return BounceMemory(min(pace.threads * pace.nbytes, nbytes))


class Fetcher:
    """What one rank reads of one checkpoint.

    Args:
        source: the checkpoint.
        files: gives the addresses; its unit is the digest block where bytes are verified, and
            its files lie apart by `MAX_GAP_BYTES`.
        filling: takes the bytes.
        verify: whether to compare them with their digests.
        in_flight_bytes: the most memory for bytes that are under way.
        memory: that memory, if it is being made ready already.
    """

    def __init__(
        self,
        source: Source,
        files: Files,
        filling: Filling,
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
        # Never less than a unit, which is what can be verified.
        self._read_bytes = max(self._pace.nbytes // files.unit_bytes, 1) * files.unit_bytes

    def fetch(self, ranges: Ranges) -> int:
        """Read `ranges`, whole units, and fill the targets with them; return the bytes read."""
        bridged = bridge(ranges, max_gap_bytes=MAX_GAP_BYTES)
        reads = cut(bridged, most_bytes=self._read_bytes)
        if not len(reads):
            return 0
        largest = int((reads.stop - reads.start).max())
        turns, threads = self._share_out(reads.nbytes, len(reads), largest=largest)
        devices = self._filling.devices
        buffers = BounceBuffers(threads, largest, devices=devices, memory=self._memory)

        def work(read: tuple[int, int]) -> None:
            start, stop = read
            with buffers.lend() as memory:
                landings = self._land(start, memory[: stop - start])
                self._read(start, [landing.view for landing in landings], turns)
                for landing in landings:
                    self._filling.settle(landing)

        in_parallel(work, reads.pairs(), threads=threads)
        return bridged.nbytes

    def fetch_into(self, reads: Sequence[tuple[int, memoryview]]) -> int:
        """Fill each buffer from its address on, whole units; return the bytes read."""
        nbytes = sum(len(data) for _, data in reads)
        if reads:
            turns, threads = self._share_out(nbytes, len(reads), largest=0)
            in_parallel(lambda read: self._read(read[0], [read[1]], turns), reads, threads=threads)
        return nbytes

    def _share_out(
        self, nbytes: int, count: int, *, largest: int
    ) -> tuple[threading.Semaphore, int]:
        """Return the turns to read and how many threads take them, for `count` reads.

        Args:
            nbytes: of all reads together.
            count: at least one.
            largest: bytes of memory that each thread takes.
        """
        reads, threads = self._pace.reads, self._pace.threads
        if nbytes // count <= _SMALL_BYTES:
            reads, threads = max(reads, _SMALL_READS), max(threads, _SMALL_READS)
        fitting = self._in_flight_bytes // max(largest, 1)
        return threading.Semaphore(reads), max(1, min(threads, fitting, count))

    def _land(self, start: int, bounce: memoryview) -> list[Landing]:
        # A disk reads to whole sectors of memory only, which tensors hardly ever begin at.
        if self._source.store.capabilities.direct_io:
            return [Landing(start, bounce)]
        return self._filling.land(start, bounce)

    def _read(self, address: int, views: Sequence[memoryview], turns: threading.Semaphore) -> None:
        file, offset = self._files.place(address)
        try:
            self._get(file, offset, views, turns)
        except IntegrityError as error:
            names = self._damaged(address, Scatter(views), turns)
            if not names:
                raise
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise IntegrityError(
                f"{error.message}. It holds bytes of {shown}", kind=error.kind, ranks=error.ranks
            ) from error

    def _get(
        self, file: int, offset: int, views: Sequence[memoryview], turns: threading.Semaphore
    ) -> None:
        with turns:
            self._source.read_into(file, offset, *views)
        if self._verify:
            self._source.compare(file, offset, *views)

    def _damaged(self, address: int, into: Scatter, turns: threading.Semaphore) -> list[str]:
        """Return the names of the tensors in the first unit that cannot be read."""
        file, offset = self._files.place(address)
        unit = self._files.unit_bytes
        for start in range(0, into.nbytes, unit):
            stop = min(start + unit, into.nbytes)
            try:
                self._get(file, offset + start, into.cut(start, stop), turns)
            except IntegrityError as error:
                if error.kind == ErrorKind.DIGEST:
                    return self._filling.names_in(address + start, address + stop)
                break
        # A whole file is missing or short, or the damage was in the way and not in the file.
        return self._filling.names_in(address, address + into.nbytes)
