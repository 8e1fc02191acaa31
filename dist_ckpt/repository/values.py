"""The Python values of one checkpoint, read and verified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format import document
from dist_ckpt.format.digest import BLOCK_BYTES, bytes_digest
from dist_ckpt.format.index import FileEntry, ObjectEntry

_KEPT_BYTES = 4 * BLOCK_BYTES


class VerifiedFiles(Protocol):
    """Files that are read by whole blocks: a checkpoint."""

    @property
    def where(self) -> str:
        """How messages name them."""
        ...

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """Name and size of each."""
        ...

    def file(self, number: int) -> FileEntry:
        """Return one with the digests of its blocks."""
        ...

    def read_blocks(self, file: int, start: int, stop: int) -> memoryview:
        """Return bytes, verified."""
        ...

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """Fill `buffers`, not verified."""
        ...

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """Compare bytes with their digests."""
        ...


class Values:
    """Reads documents of one checkpoint; safe from threads.

    A small file of them is read whole and kept: it has the values of all parts, which are asked for
    one after another.
    """

    def __init__(self, files: VerifiedFiles) -> None:
        self._files = files
        self._kept: tuple[int, memoryview] = -1, memoryview(b"")

    def fetch(self, entries: Iterable[ObjectEntry]) -> None:
        """Read the file of `entries`, not verified yet, if that is one and small.

        Raises:
            IntegrityError: it is missing or truncated.
        """
        files = {entry.file for entry in entries}
        if len(files) == 1:
            (file,) = files
            if self._files.files[file][1] <= _KEPT_BYTES:
                self._keep(file)

    def read_all(self, entries: Iterable[ObjectEntry], *, part: str) -> dict[str, bytes]:
        """Return the encoded values under `entries`, all of one part, by name.

        Raises:
            IntegrityError: see `read`; or a value is stored twice.
        """
        where = f"part {part!r} of {self._files.where}"
        known: dict[str, bytes] = {}
        for entry in entries:
            found = document.decode(self.read(entry), where=where)
            twice = sorted(found.keys() & known.keys())
            if twice:
                raise IntegrityError(
                    f"{where}: value {twice[0]!r} is stored twice", kind=ErrorKind.MALFORMED
                )
            known.update(found)
        return known

    def read(self, entry: ObjectEntry) -> bytes:
        """Return the encoded values under `entry`, verified.

        Raises:
            IntegrityError: the file is missing, truncated, or differs from its digests.
        """
        stop = entry.offset + entry.nbytes
        first, last = self._files.file(entry.file).around(entry.offset, stop)
        data = bytes(self._blocks(entry.file, first, last)[entry.offset - first : stop - first])
        if bytes_digest(data) != entry.digest:
            raise IntegrityError(
                f"{self._files.where}: the values of part {entry.part!r} differ from their digest"
            )
        return data

    def _blocks(self, file: int, start: int, stop: int) -> memoryview:
        if self._files.files[file][1] > _KEPT_BYTES:
            return self._files.read_blocks(file, start, stop)
        kept_file, kept = self._kept  # one look: another thread may replace it
        if kept_file != file:
            kept = self._keep(file)
        self._files.compare(file, start, kept[start:stop])
        return kept[start:stop]

    def _keep(self, file: int) -> memoryview:
        kept = memoryview(bytearray(self._files.files[file][1]))
        self._files.read_into(file, 0, kept)
        self._kept = file, kept
        return kept
