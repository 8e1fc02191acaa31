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

from dist_ckpt.format import index as index_format
from dist_ckpt.format import root as root_format
from dist_ckpt.format import segment as segment_format
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import segment_name
from dist_ckpt.format.root import Root, SegmentNote
from dist_ckpt.format.segment import Segment
from dist_ckpt.format.tables import Column
from dist_ckpt.format.whole import joined
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


def described(manifest: Manifest, data: bytes, read: ReadSegment) -> Described:
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
        chunks = self._index.chunks
        offsets: Column = chunks.offset[chunks.file == number].astype(np.int64)
        return offsets

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
        return joined(self._root, self._take(range(len(self._root.segments))))

    def of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        places = self._root.places_of(self._root.structure.holders(wanted))
        if len(places) == len(self._root.segments):
            return self._whole
        last_places, last = self._last  # one look: another thread may replace it
        if last is None or last_places != places:
            last = joined(self._root, self._take(places))
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
        in_parallel(self._decode, missing, threads=min(_THREADS, len(missing)))
        return {place: self._known[place] for place in wanted}

    def _decode(self, place: int) -> None:
        note = self._root.segments[place]
        data = note.inside or self._read(note)
        self._known[place] = segment_format.decode(data, self._root, place)
