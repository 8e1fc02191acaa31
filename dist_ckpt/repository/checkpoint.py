"""One committed checkpoint, opened: its manifest, its index, and verified reads of its files.

In format 1 one index says all of it. In format 2 the root says which segments there are; they are
read when something in them is asked for, and kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property, partial
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format import whole as whole_format
from dist_ckpt.format.files import BLOCK_BYTES, FileEntry, bytes_digest
from dist_ckpt.format.index import Box, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.manifest import FilesTotal, Manifest, decode_document
from dist_ckpt.format.names import INDEX, Column, file_key, manifest_key, segment_name, step_dir
from dist_ckpt.format.segments import (
    Root,
    Segment,
    SegmentNote,
    decode_root,
    decode_segment,
    join_segments,
)
from dist_ckpt.repository.commit import read_manifest
from dist_ckpt.repository.source import Source
from dist_ckpt.storage.base import Store, holds, read_all, read_file
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import ahead, in_parallel

_PAGE_BYTES = 4096
# Above so many one listing is asked in the place of a question for each.
_MANY_FILES = 64
_THREADS = 16
_KEPT_BYTES = 4 * BLOCK_BYTES
_LOOKS = 3

CheckpointT = TypeVar("CheckpointT")

PIECE_BYTES = 16 << 20
"""About how much of a file is read at once by who goes through all of it."""


class Checkpoint:
    """A committed checkpoint: the `Source` of what dist_ckpt wrote. Reading is safe from threads.

    Attributes:
        step: the training step.
        manifest: what was committed, decoded and checked.
        tensors: every tensor of every part.
        files: name and size of each shard file.
        beside: the segments that are files of their own, by name.
        nbytes: of all shard files together.
    """

    def __init__(
        self, store: Store, manifest_bytes: bytes, index_bytes: bytes, *, step: int
    ) -> None:
        """Decode and cross-check the two descriptions; no data file is touched.

        Raises:
            IntegrityError: they are damaged or contradict one another.
            IncompatibleError: the format version is not known.
        """
        self.store = store
        self.step = step
        self.manifest_bytes = manifest_bytes
        self.index_bytes = index_bytes
        self._values = _Values(self)
        self.manifest: Manifest = manifest_format.decode(manifest_bytes, step=step)
        index = self.manifest.index
        # Before it is decoded: nothing is made of bytes that do not fit their digest.
        self._check_bytes(index_bytes, f"index {index.key}", index.nbytes, index.digest)
        self._described = _open_description(self.manifest, index_bytes, self._read_segment)
        self.tensors: tuple[TensorEntry, ...] = self._described.tensors
        self.files: Sequence[tuple[str, int]] = self._described.files
        self.beside: Mapping[str, SegmentNote] = self._described.beside
        self.nbytes: int = self.manifest.files.nbytes
        self._check_files_agree()
        self._check_parts_agree()

    @classmethod
    def read(cls, store: Store, step: int) -> Checkpoint:
        """Open `step` from storage.

        Raises:
            NotFound: no such step is committed, or it was deleted meanwhile.
            IntegrityError: the manifest or the index is damaged or missing.
            IncompatibleError: the format version is not known.
        """
        return reread(lambda: cls.open(store, read_manifest(store, step), step=step))

    @classmethod
    def open(cls, store: Store, manifest_bytes: bytes, *, step: int) -> Checkpoint:
        """Open `step`, given its manifest as it was just read. See `read`."""
        try:
            manifest = manifest_format.decode(manifest_bytes, step=step)
            key = f"{step_dir(step)}/{manifest.index.key}"
            try:
                # Its size is known, so one request is enough, and more of it is not read.
                nbytes = manifest.index.nbytes
                index_bytes = read_all(store, key, likely_bytes=nbytes, limit_bytes=nbytes)
            except NotFound as error:
                raise IntegrityError(
                    f"step {step} in {store.url}: its index {key} is missing",
                    kind=ErrorKind.MISSING_FILE,
                ) from error
            return cls(store, manifest_bytes, index_bytes, step=step)
        except IntegrityError as error:
            # Looked at before it is called damage: retention may have been faster (commit-v1, 5).
            if not holds(store, manifest_key(step), manifest_bytes):
                raise deleted_meanwhile(store, step) from error
            raise

    @property
    def index(self) -> Index:
        """Where every chunk lies; all that describes them is read for that.

        Raises:
            IntegrityError: some of it is damaged or missing.
        """
        return self._described.whole()

    def index_of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        """Return what of the index there must be to read boxes; see `Source.index_of`.

        Raises:
            IntegrityError: what describes them is damaged or missing.
        """
        return self._described.of(wanted)

    def still_there(self) -> bool:
        """Whether this very checkpoint is still committed: neither deleted nor saved anew.

        So damage is told from a retention that was faster.
        """
        return holds(self.store, manifest_key(self.step), self.manifest_bytes)

    def check_sizes(self) -> None:
        """Compare the size of every file with what was committed, reading no data.

        Raises:
            IntegrityError: a file is missing, shorter or longer.
        """
        listed = self.listed(self.files)
        for number in range(len(self.files)):
            self.check_size(number, listed)

    def check_some(self, files: Sequence[int]) -> None:
        """Compare the sizes of `files`, many at a time, and fetch what values there are meanwhile.

        Raises:
            IntegrityError: a file is missing, shorter or longer.
        """
        values = [
            entry
            for part in self._described.value_parts
            for entry in self._described.objects(part, rank=0)
            if entry.file in files
        ]
        work: list[Callable[[], None]] = [partial(self._values.fetch, values)]
        listed = self.listed(files)
        work += [partial(self.check_size, file, listed) for file in files]
        in_parallel(lambda each: each(), work, threads=min(_THREADS, len(work)))

    def check_parts(self, selects_part: Callable[[str], bool]) -> None:
        """Compare the sizes of the files in which the selected parts lie; see `check_some`."""
        self.check_some(self.files_of(selects_part))

    def files_of(self, selects_part: Callable[[str], bool]) -> Sequence[int]:
        """Return the numbers of the files in which the selected parts lie, ascending."""
        # Without the index, for which every segment would have to be read.
        if all(map(selects_part, self.parts)):
            return range(len(self.files))
        index = self.index
        selected = np.array([selects_part(tensor.part) for tensor in index.tensors], bool)
        files = set(np.unique(index.chunks.file[selected[index.chunks.tensor]]).tolist())
        files |= {entry.file for entry in index.objects if selects_part(entry.part)}
        return sorted(files)

    def listed(self, files: Sequence[object]) -> Mapping[str, int] | None:
        """Return the sizes of what is there by key, None where `files` are few: ask for each."""
        if len(files) <= _MANY_FILES:
            return None
        folder = self.key(INDEX).removesuffix(INDEX)
        return {entry.key: entry.nbytes for entry in self.store.list_entries(folder)}

    def check_size(self, file: int, listed: Mapping[str, int] | None = None) -> None:
        """Compare the size of file number `file` with what was committed.

        Args:
            file: position in `files`.
            listed: what `listed` returned; None to ask for this file alone.

        Raises:
            IntegrityError: it is missing, shorter or longer.
        """
        name, committed = self.files[file]
        key = self.key(name)
        try:
            nbytes = self.store.size(key) if listed is None else listed.get(key)
        except NotFound as error:
            raise self._missing(key) from error
        if nbytes is None:
            raise self._missing(key)
        if nbytes != committed:
            raise IntegrityError(
                f"{self.where}: file {key} holds {nbytes} bytes, committed were {committed}",
                kind=ErrorKind.TRUNCATED,
            )

    def read_blocks(self, file: int, start: int, stop: int) -> memoryview:
        """Return the bytes `start:stop` of file number `file`, each one verified.

        Args:
            file: position in `files`.
            start: where a block begins.
            stop: where one ends.

        Raises:
            IntegrityError: the file is missing, truncated, or a block differs from its digest.
        """
        # A page of memory for each of the file, so that a disk can read into it directly.
        skip = start % _PAGE_BYTES
        data = aligned_buffer(skip + stop - start)
        self.read_into(file, start - skip, data)
        self.compare(file, start, data[skip:])
        return data[skip:]

    def read_pieces(self, file: int) -> Iterator[memoryview]:
        """Yield the bytes of file number `file`, verified, in pieces. See `read_blocks`.

        Another piece is read, and compared, while one is used.
        """
        spans = self.file(file).spans(PIECE_BYTES)
        return ahead(lambda span: self.read_blocks(file, *span), spans, count=1)

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """Fill `buffers` with bytes of file number `file`, not verified; see `Source.read_into`.

        Raises:
            IntegrityError: the file is missing or truncated.
        """
        name, nbytes = self.files[file]
        key = self.key(name)
        try:
            count = read_file(self.store, key, start, buffers)
        except NotFound as error:
            raise self._missing(key) from error
        if count != sum(map(len, buffers)):
            raise IntegrityError(
                f"{self.where}: file {key} ends at byte {start + count}, {nbytes} were committed",
                kind=ErrorKind.TRUNCATED,
            )

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """Compare bytes of file number `file` with their digests; see `Source.compare`.

        Raises:
            IntegrityError: a block differs from its digest; names it.
        """
        entry = self.file(file)
        damaged = entry.find_damaged(start, *buffers)
        if damaged is not None:
            block, begin, end = damaged
            raise IntegrityError(
                f"{self.where}: file {self.key(entry.name)}, block {block} (bytes {begin} to {end})"
                " differs from its digest: the data was damaged after it was written"
            )

    def file(self, number: int) -> FileEntry:
        """Return file number `number` with the digests of its blocks.

        Raises:
            IntegrityError: what describes it is damaged or missing.
        """
        return self._described.file(number)

    def offsets(self, file: int) -> Column:
        """Return where in file number `file` chunks begin.

        Raises:
            IntegrityError: what describes it is damaged or missing.
        """
        return self._described.offsets(file)

    def read_objects(self, part: str, *, rank: int) -> dict[str, bytes]:
        """Return the encoded Python values of `part` by name: shared ones and those of `rank`.

        Raises:
            IntegrityError: see `read_object`; or a value is stored twice.
        """
        return self._values.read_all(self._described.objects(part, rank=rank), part=part)

    def read_object(self, entry: ObjectEntry) -> bytes:
        """Return the encoded Python values under `entry`, verified.

        Raises:
            IntegrityError: see `read_blocks`.
        """
        return self._values.read(entry)

    @property
    def where(self) -> str:
        """How messages name this checkpoint."""
        return f"step {self.step} in {self.store.url}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that were committed, also those without a tensor."""
        return tuple(self.manifest.parts)

    @property
    def save_id(self) -> str:
        """The attempt that wrote it."""
        return self.manifest.save_id

    @property
    def saved_world_size(self) -> int:
        """How many ranks saved it."""
        return self.manifest.world_size

    @property
    def verified(self) -> bool:
        """Whether there are digests: always."""
        return True

    def key(self, name: str) -> str:
        """Return the key of its file `name`."""
        return file_key(self.step, self.manifest.save_id, name)

    def at(self, store: Store) -> Checkpoint:
        """Return the same checkpoint, its files being read from another store."""
        moved = copy(self)
        moved.store = store
        # Of its own: what is kept by the other was read from the other store.
        moved._values = _Values(moved)  # noqa: SLF001 a checkpoint as well
        return moved

    def read_beside(self, name: str) -> bytes:
        """Return a file of `beside`, compared with its digest.

        Raises:
            IntegrityError: it is missing, or another one than was committed.
        """
        return self._read_segment(self.beside[name])

    def _missing(self, key: str) -> IntegrityError:
        away = self.manifest.elsewhere(key.rpartition("/")[2])
        return IntegrityError(
            f"{self.where}: file {key} is missing{away}", kind=ErrorKind.MISSING_FILE
        )

    def _read_segment(self, note: SegmentNote) -> bytes:
        key = self.key(segment_name(note.rank))
        try:
            data = read_all(self.store, key, likely_bytes=note.nbytes, limit_bytes=note.nbytes)
        except NotFound as error:
            raise self._missing(key) from error
        self._check_bytes(data, f"file {key}", note.nbytes, note.digest)
        return data

    def _check_bytes(self, data: bytes, what: str, nbytes: int, digest: str) -> None:
        # The size first, which tells what was cut short from what was changed.
        if len(data) != nbytes:
            raise IntegrityError(
                f"{self.where}: {what} holds {len(data)} bytes, committed were {nbytes}",
                kind=ErrorKind.TRUNCATED,
            )
        if bytes_digest(data) != digest:
            raise IntegrityError(f"{self.where}: {what} differs from its digest")

    def _check_parts_agree(self) -> None:
        known = {entry.part for entry in self.tensors} | self._described.value_parts
        unlisted = sorted(known - set(self.manifest.parts))
        if unlisted:
            raise IntegrityError(
                f"{self.where}: the index has parts that the manifest does not list: "
                f"{', '.join(unlisted)}",
                kind=ErrorKind.MALFORMED,
            )

    def _check_files_agree(self) -> None:
        what = []
        if self.manifest.listed is not None:
            prefix = f"{self.manifest.save_id}/"
            listed = {(f.key, f.nbytes, f.digest) for f in self.manifest.listed}
            indexed = {(prefix + f.name, f.nbytes, f.digest) for f in self.index.files}
            what = sorted(key for key, _, _ in listed ^ indexed)
        # A manifest of format 2 has the sum alone: names and sizes stand in the root.
        elif FilesTotal.of(nbytes for _, nbytes in self.files) != self.manifest.files:
            what = ["how many files there are, or how large they are"]
        if what:
            raise IntegrityError(
                f"{self.where}: manifest and index disagree about {', '.join(what[:3])}",
                kind=ErrorKind.MALFORMED,
            )


# What a checkpoint says of its files, whichever format it has: one view of both.


_ReadSegment = Callable[[SegmentNote], bytes]
"""Returns the bytes of a segment that is a file of its own, compared with its digest."""


class _Described(Protocol):
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


def _open_description(manifest: Manifest, data: bytes, read: _ReadSegment) -> _Described:
    """Return what `data`, the index that `manifest` names, describes.

    Args:
        manifest: says of which format it is.
        data: compared with its digest.
        read: called for a segment when it is needed.

    Raises:
        IntegrityError: it breaks a rule of its format.
        IncompatibleError: it is of another format than the manifest, or of a newer one.
    """
    if manifest.format == whole_format.FORMAT:
        return _OneIndex(whole_format.decode(data))
    return _Segments(decode_root(data), read)


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
        # Sorted once, since who goes through a checkpoint asks for file after file.
        order = np.argsort(chunks.file, kind="stable")
        return chunks.file[order].astype(np.int64), chunks.offset[order].astype(np.int64)

    def objects(self, part: str, *, rank: int) -> list[ObjectEntry]:
        found = self._index.objects
        return [entry for entry in found if entry.part == part and entry.rank in (None, rank)]


class _Segments:
    """Of format 2."""

    def __init__(self, root: Root, read: _ReadSegment) -> None:
        self._root = root
        self._read = read
        # Filled by several threads without a lock: two that read one segment store equal ones.
        self._known: dict[int, Segment] = {}
        # One value, so that no thread ever sees the places of one index beside another index.
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
        # To the right, past segments without a file, which begin where the next one does.
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
        # What is behind the root was compared together with it, by the digest in the manifest.
        data = note.inside or self._read(note)
        self._known[place] = decode_segment(data, self._root, place)


# The Python values of a checkpoint, read and verified.


class _Values:
    """Reads documents of one checkpoint; safe from threads.

    A small file of them is read whole and kept: it has the values of all parts, which are asked for
    one after another.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._kept: tuple[int, memoryview] = -1, memoryview(b"")

    def fetch(self, entries: Iterable[ObjectEntry]) -> None:
        """Read the file of `entries`, not verified yet, if that is one and small.

        Raises:
            IntegrityError: it is missing or truncated.
        """
        files = {entry.file for entry in entries}
        if len(files) == 1:
            (file,) = files
            if self._checkpoint.files[file][1] <= _KEPT_BYTES:
                self._keep(file)

    def read_all(self, entries: Iterable[ObjectEntry], *, part: str) -> dict[str, bytes]:
        """Return the encoded values under `entries`, all of one part, by name.

        Raises:
            IntegrityError: see `read`; or a value is stored twice.
        """
        where = f"part {part!r} of {self._checkpoint.where}"
        known: dict[str, bytes] = {}
        for entry in entries:
            found = decode_document(self.read(entry), where=where)
            twice = sorted(found.keys() & known.keys())
            # Stages of a pipeline share a part, each with names of its own: format-v1, section 4.
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
        # Whole blocks, as nothing less has a digest; the values have one of their own besides.
        first, last = self._checkpoint.file(entry.file).around(entry.offset, stop)
        data = bytes(self._blocks(entry.file, first, last)[entry.offset - first : stop - first])
        if bytes_digest(data) != entry.digest:
            raise IntegrityError(
                f"{self._checkpoint.where}: the values of part {entry.part!r} differ from their "
                "digest"
            )
        return data

    def _blocks(self, file: int, start: int, stop: int) -> memoryview:
        if self._checkpoint.files[file][1] > _KEPT_BYTES:
            return self._checkpoint.read_blocks(file, start, stop)
        kept_file, kept = self._kept  # one look: another thread may replace it
        if kept_file != file:
            kept = self._keep(file)
        # Each time: what is kept was read and not compared, but for these blocks now.
        self._checkpoint.compare(file, start, kept[start:stop])
        return kept[start:stop]

    def _keep(self, file: int) -> memoryview:
        kept = memoryview(bytearray(self._checkpoint.files[file][1]))
        self._checkpoint.read_into(file, 0, kept)
        self._kept = file, kept
        return kept


# A checkpoint may be deleted, or saved anew, under whoever reads it.


class DeletedMeanwhile(NotFound):
    """A checkpoint was deleted, or saved anew, while it was read: look again."""


def deleted_meanwhile(store: Store, step: int) -> DeletedMeanwhile:
    """Return the error that says so of `step`."""
    return DeletedMeanwhile(
        f"the checkpoint of step {step} in {store.url} was deleted or replaced while it was read, "
        "by the retention of the job that owns the run or by hand: read another one, or the "
        "newest anew",
        kind=ErrorKind.NO_CHECKPOINT,
    )


def reread(look: Callable[[], CheckpointT]) -> CheckpointT:
    """Return `look()`, and look again where the checkpoint was deleted or saved anew meanwhile.

    Raises:
        NotFound: it is gone.
    """
    # What keeps being deleted while it is read is gone for whoever asked.
    for _ in range(_LOOKS - 1):
        with suppress(DeletedMeanwhile):
            return look()
    return look()


@contextmanager
def unless_deleted(source: Source) -> Iterator[None]:
    """Turn damage that the body finds into `NotFound` where `source` was deleted or replaced.

    Retention beside a reader takes the files away under it; that is no damage.
    """
    try:
        yield
    except IntegrityError as error:
        if not source.still_there():
            raise deleted_meanwhile(source.store, source.step) from error
        raise
