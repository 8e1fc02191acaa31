"""Reads ranges of a checkpoint by several threads: into memory, verified, and on to the targets."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ckpt.dcp.filling import Filling
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.repository.source import Source
from dist_ckpt.staging.bounce import BounceBuffers, BounceMemory
from dist_ckpt.storage.parallel import in_parallel
from dist_ckpt.storage.ranges import Files, Ranges, bridge, cut

_DISK_BYTES, _DISK_THREADS = 8 << 20, 8
"""Of a disk: each read is one request of the kernel, and eight at a time keep it busy."""

_REMOTE_BYTES, _REMOTE_THREADS = 16 << 20, 6
"""Of other stores, which share a read out to two or more requests by themselves: many small ones
cost processor time each, few large ones do not fill a network where each is slow."""

MAX_GAP_BYTES = 1 << 20
"""Over how many bytes at most that nobody wants a read goes on, inside of a file."""

# Small reads are a matter of latency, which only many at a time can hide.
_SMALL_BYTES, _SMALL_THREADS = 4 << 20, 8


def _large_reads(source: Source, in_flight_bytes: int) -> tuple[int, int]:
    """Return how many large reads are under way at once, and how many bytes each has at most."""
    disk = source.store.capabilities.direct_io
    threads = _DISK_THREADS if disk else _REMOTE_THREADS
    return threads, min(_DISK_BYTES if disk else _REMOTE_BYTES, in_flight_bytes // threads)


def warm_memory(source: Source, in_flight_bytes: int) -> BounceMemory:
    """Begin to make memory ready for reading as much as all of `source`; see `Fetcher`."""
    threads, most = _large_reads(source, in_flight_bytes)
    return BounceMemory(min(threads * most, sum(file.nbytes for file in source.index.files)))


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
        self._large_threads, most = _large_reads(source, in_flight_bytes)
        # Never less than a unit, which is what can be verified.
        self._read_bytes = max(most // files.unit_bytes, 1) * files.unit_bytes

    def fetch(self, ranges: Ranges) -> int:
        """Read `ranges`, whole units, and fill the targets with them; return the bytes read."""
        bridged = bridge(ranges, max_gap_bytes=MAX_GAP_BYTES)
        reads = cut(bridged, most_bytes=self._read_bytes)
        if not len(reads):
            return 0
        largest = int((reads.stop - reads.start).max())
        threads = self._threads(reads.nbytes // len(reads), largest, len(reads))
        devices = self._filling.devices
        buffers = BounceBuffers(threads, largest, devices=devices, memory=self._memory)

        def work(read: tuple[int, int]) -> None:
            start, stop = read
            with buffers.lend() as memory:
                data = memory[: stop - start]
                self._read(start, data)
                self._filling.fill(start, data)

        in_parallel(work, reads.pairs(), threads=threads)
        return bridged.nbytes

    def fetch_into(self, reads: Sequence[tuple[int, memoryview]]) -> int:
        """Fill each buffer from its address on, whole units; return the bytes read."""
        nbytes = sum(len(data) for _, data in reads)
        if reads:
            threads = self._threads(nbytes // len(reads), 0, len(reads))
            in_parallel(lambda read: self._read(*read), reads, threads=threads)
        return nbytes

    def _threads(self, mean: int, largest: int, count: int) -> int:
        """Return how many threads are worth it, for reads of a mean size, and fit into memory."""
        wanted = _SMALL_THREADS if mean <= _SMALL_BYTES else self._large_threads
        fitting = self._in_flight_bytes // max(largest, 1)
        return max(1, min(wanted, fitting, count))

    def _read(self, address: int, data: memoryview) -> None:
        file, offset = self._files.place(address)
        try:
            self._source.read_into(file, offset, data, verify=self._verify)
        except IntegrityError as error:
            names = self._damaged(file, offset, address, data)
            if not names:
                raise
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise IntegrityError(
                f"{error.message}. It holds bytes of {shown}", kind=error.kind, ranks=error.ranks
            ) from error

    def _damaged(self, file: int, offset: int, address: int, data: memoryview) -> list[str]:
        """Return the names of the tensors in the first unit that cannot be read."""
        unit = self._files.unit_bytes
        for start in range(0, len(data), unit):
            piece = data[start : start + unit]
            try:
                self._source.read_into(file, offset + start, piece, verify=self._verify)
            except IntegrityError as error:
                if error.kind == ErrorKind.DIGEST:
                    return self._filling.names_in(address + start, address + start + len(piece))
                break
        # A whole file is missing or short, or the damage was in the way and not in the file.
        return self._filling.names_in(address, address + len(data))
