"""Reads ranges of a checkpoint by several threads: into memory, verified, and on to the targets."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ckpt.dcp.filling import Filling
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.repository.source import Source
from dist_ckpt.staging.bounce import BounceBuffers
from dist_ckpt.storage.parallel import in_parallel
from dist_ckpt.storage.ranges import Files, Ranges, bridge, cut

READ_BYTES = 4 << 20
"""How much one read brings at most: as much as a disk takes at once, and S3 by one request."""

MAX_GAP_BYTES = 1 << 20
"""Over how many bytes at most that nobody wants a read goes on, inside of a file."""

_THREADS = 8


class Fetcher:
    """What one rank reads of one checkpoint.

    Args:
        source: the checkpoint.
        files: gives the addresses; its unit is the digest block where bytes are verified, and
            its files lie apart by `MAX_GAP_BYTES`.
        filling: takes the bytes.
        verify: whether to compare them with their digests.
        in_flight_bytes: the most memory for bytes that are under way.
    """

    def __init__(
        self,
        source: Source,
        files: Files,
        filling: Filling,
        *,
        verify: bool,
        in_flight_bytes: int,
    ) -> None:
        self._source = source
        self._files = files
        self._filling = filling
        self._verify = verify
        # Never less than a unit, which is what can be verified.
        self._read_bytes = max(
            min(READ_BYTES, in_flight_bytes) // files.unit_bytes * files.unit_bytes,
            files.unit_bytes,
        )
        self._threads = max(1, min(_THREADS, in_flight_bytes // self._read_bytes))

    def fetch(self, ranges: Ranges) -> int:
        """Read `ranges`, whole units, and fill the targets with them; return the bytes read."""
        bridged = bridge(ranges, max_gap_bytes=MAX_GAP_BYTES)
        reads = cut(bridged, most_bytes=self._read_bytes)
        threads = min(self._threads, len(reads))
        buffers = BounceBuffers(threads, self._read_bytes, devices=self._filling.devices)

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
        in_parallel(lambda read: self._read(*read), reads, threads=min(self._threads, len(reads)))
        return sum(len(data) for _, data in reads)

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
