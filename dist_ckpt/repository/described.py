"""What a checkpoint says of its files, whichever format it has: one view of both.

In format 1 one index says all of it. In format 2 the root says which segments there are; they are
read when something in them is asked for, and kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format import document
from dist_ckpt.format import index as index_format
from dist_ckpt.format import root as root_format
from dist_ckpt.format import segment as segment_format
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.digest import BLOCK_BYTES, bytes_digest
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import segment_name
from dist_ckpt.format.root import Root, SegmentNote
from dist_ckpt.format.segment import Segment, join_segments
from dist_ckpt.format.tables import Column
from dist_ckpt.storage.parallel import in_parallel

ReadSegment = Callable[[SegmentNote], bytes]
"""Returns the bytes of a segment that is a file of its own, compared with its digest."""

_THREADS = 16


class Described(Protocol):
    """What is asked of a description."""

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Every tensor."""
        ...

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """Name and size of every shard file."""
        ...

    @property
    def beside(self) -> Mapping[str, SegmentNote]:
        """The segments that are files of their own, by name."""
        ...

    @property
    def value_parts(self) -> set[str]:
        """The parts that have Python values."""
        ...

    def whole(self) -> Index:
        """Return all of the index."""
        ...

    def of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        """Return what there must be to read boxes; see `Source.index_of`."""
        ...

    def file(self, number: int) -> FileEntry:
        """Return a file with its digests."""
        ...

    def offsets(self, number: int) -> Column:
        """Return where in a file its chunks begin, those of tied tensors perhaps several times."""
        ...

    def objects(self, part: str, *, rank: int) -> list[ObjectEntry]:
        """Return the documents of `part`: those that all ranks share, and those of `rank`."""
        ...


def open_description(manifest: Manifest, data: bytes, read: ReadSegment) -> Described:
    """Return what `data`, the index that `manifest` names, describes.

    Args:
        manifest: says of which format it is.
        data: compared with its digest.
        read: called for a segment when it is needed.

    Raises:
        IntegrityError: it breaks a rule of its format.
        IncompatibleError: it is of another format than the manifest, or of a newer one.
    """
    if manifest.format == index_format.FORMAT:
        return _OneIndex(index_format.decode(data))
    return _Segments(root_format.decode(data), read)


class _OneIndex:
    """Of format 1."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.tensors = index.tensors
        self.files = [(file.name, file.nbytes) for file in index.files]
        self.beside: Mapping[str, SegmentNote] = {}
        self.value_parts = {entry.part for entry in index.objects}

    def whole(self) -> Index:
        return self._index

    def of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        return self._index

    def file(self, number: int) -> FileEntry:
        return self._index.files[number]

    def offsets(self, number: int) -> Column:
        files, offsets = self._by_file
        first, last = np.searchsorted(files, (number, number + 1))
        return offsets[first:last]

    @cached_property
    def _by_file(self) -> tuple[Column, Column]:
        chunks = self._index.chunks
        order = np.argsort(chunks.file, kind="stable")
        return chunks.file[order].astype(np.int64), chunks.offset[order].astype(np.int64)

    def objects(self, part: str, *, rank: int) -> list[ObjectEntry]:
        found = self._index.objects
        return [entry for entry in found if entry.part == part and entry.rank in (None, rank)]


class _Segments:
    """Of format 2."""

    def __init__(self, root: Root, read: ReadSegment) -> None:
        self._root = root
        self._read = read
        self._known: dict[int, Segment] = {}
        self._last: tuple[list[int], Index | None] = [], None
        self.tensors = root.structure.tensors
        self.files = [file for note in root.segments for file in note.files]
        outside = (note for note in root.segments if not note.inside)
        self.beside = {segment_name(note.rank): note for note in outside}
        self.value_parts = {part for note in root.segments for part, _ in note.objects}

    def whole(self) -> Index:
        return self._whole

    @cached_property
    def _whole(self) -> Index:
        return join_segments(self._root, self._take(range(len(self._root.segments))))

    def of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        places = self._root.places_of(self._root.structure.holders(wanted))
        if len(places) == len(self._root.segments):
            return self._whole
        last_places, last = self._last  # one look: another thread may replace it
        if last is None or last_places != places:
            last = join_segments(self._root, self._take(places))
            self._last = places, last
        return last

    def file(self, number: int) -> FileEntry:
        segment, local = self._find(number)
        return segment.files[local]

    def offsets(self, number: int) -> Column:
        segment, local = self._find(number)
        offsets: Column = segment.offset[segment.file == local]
        return offsets

    def _find(self, number: int) -> tuple[Segment, int]:
        """Return the segment that a file is in, and its position there."""
        place = bisect_right(self._root.first_files, number) - 1
        return self._take([place])[place], number - self._root.first_files[place]

    def objects(self, part: str, *, rank: int) -> list[ObjectEntry]:
        places = self._root.places_of_part(part, rank=rank)
        found = self._take(places)
        return [
            msgspec.structs.replace(entry, file=self._root.first_files[place] + entry.file)
            for place in places
            for entry in found[place].objects
            if entry.part == part and entry.rank in (None, rank)
        ]

    def _take(self, places: Iterable[int]) -> dict[int, Segment]:
        """Return segments by their positions, having read those that were not asked for before."""
        wanted = list(places)
        missing = [place for place in wanted if place not in self._known]
        if missing:
            in_parallel(self._decode, missing, threads=min(_THREADS, len(missing)))
        return {place: self._known[place] for place in wanted}

    def _decode(self, place: int) -> None:
        note = self._root.segments[place]
        data = note.inside or self._read(note)
        self._known[place] = segment_format.decode(data, self._root, place)


# The Python values of a checkpoint, read and verified.


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
