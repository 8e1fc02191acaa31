"""One committed checkpoint, opened: its manifest, its index, and verified reads of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound
from dist_ckpt.format import document
from dist_ckpt.format import index as index_format
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.digest import BLOCK_BYTES, block_digests, bytes_digest
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry
from dist_ckpt.format.manifest import LIMIT_BYTES, Manifest
from dist_ckpt.format.names import file_key, manifest_key, step_dir
from dist_ckpt.repository.source import Source, read_file
from dist_ckpt.storage.base import Store, holds, read_all
from dist_ckpt.storage.direct import aligned_buffer

_LOOKS = 3

CheckpointT = TypeVar("CheckpointT")


def read_manifest(store: Store, step: int) -> bytes:
    """Return the manifest of `step` as it is stored, not decoded.

    Raises:
        NotFound: no such step is committed.
        IntegrityError: it cannot be a manifest, of which not much was read then.
    """
    try:
        # One byte is looked at before all of them: what a file claims to hold may be one hole.
        return read_all(store, manifest_key(step), limit_bytes=LIMIT_BYTES, begins=b"{")
    except NotFound:
        raise NotFound(
            f"no checkpoint of step {step} in {store.url}", kind=ErrorKind.NO_CHECKPOINT
        ) from None


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


_KEPT_BYTES = 4 * BLOCK_BYTES
_PIECE_BYTES = 16 * BLOCK_BYTES


def file_pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the beginnings and ends of the pieces of 16 MiB in which a file is gone through."""
    for start in range(0, nbytes, _PIECE_BYTES):
        yield start, min(start + _PIECE_BYTES, nbytes)


class Checkpoint:
    """A committed checkpoint: the `Source` of what dist_ckpt wrote. Reading is safe from threads.

    Attributes:
        step: the training step.
        manifest: what was committed, decoded and checked.
        index: the chunk table, decoded and checked.
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
        self._kept: tuple[int, int, memoryview] = -1, 0, memoryview(b"")
        self.manifest: Manifest = manifest_format.decode(manifest_bytes, step=step)
        self._check_index_bytes()
        self.index: Index = index_format.decode(index_bytes)
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
                index_bytes = read_all(store, key, likely_bytes=manifest.index.nbytes)
            except NotFound as error:
                raise IntegrityError(
                    f"step {step} in {store.url}: its index {key} is missing",
                    kind=ErrorKind.MISSING_FILE,
                ) from error
            return cls(store, manifest_bytes, index_bytes, step=step)
        except IntegrityError as error:
            if not holds(store, manifest_key(step), manifest_bytes):
                raise deleted_meanwhile(store, step) from error
            raise

    def still_there(self) -> bool:
        """Whether this very checkpoint is still committed: neither deleted nor saved anew.

        A reader who finds a file missing asks this, to tell damage from a retention that was
        faster.
        """
        return holds(self.store, manifest_key(self.step), self.manifest_bytes)

    def check_sizes(self) -> None:
        """Compare the size of every file with what was committed, reading no data.

        Raises:
            IntegrityError: a file is missing, shorter or longer.
        """
        for number in range(len(self.index.files)):
            self.check_size(number)

    def check_size(self, file: int) -> None:
        """Compare the size of file number `file` with what was committed.

        Raises:
            IntegrityError: it is missing, shorter or longer.
        """
        entry = self.index.files[file]
        key = self._key(entry)
        try:
            nbytes = self.store.size(key)
        except NotFound as error:
            raise IntegrityError(
                f"{self.where}: file {key} is missing", kind=ErrorKind.MISSING_FILE
            ) from error
        if nbytes != entry.nbytes:
            raise IntegrityError(
                f"{self.where}: file {key} holds {nbytes} bytes, committed were {entry.nbytes}",
                kind=ErrorKind.TRUNCATED,
            )

    def read_blocks(self, file: int, start: int, stop: int) -> memoryview:
        """Return the bytes `start:stop` of file number `file`, each one verified.

        Args:
            file: position in `index.files`.
            start: a multiple of the digest block size.
            stop: a multiple of it too, or the end of the file.

        Raises:
            IntegrityError: the file is missing, truncated, or a block differs from its digest.
        """
        # On a page, so that a disk can read into it directly.
        data = aligned_buffer(stop - start)
        self.read_into(file, start, data)
        self.compare(file, start, data)
        return data

    def read_pieces(self, file: int) -> Iterator[memoryview]:
        """Yield the bytes of file number `file` in `file_pieces`. See `read_blocks`."""
        for start, stop in file_pieces(self.index.files[file].nbytes):
            yield self.read_blocks(file, start, stop)

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """Fill `buffers` with bytes of file number `file`, not verified; see `Source.read_into`.

        Raises:
            IntegrityError: the file is missing or truncated.
        """
        entry = self.index.files[file]
        key = self._key(entry)
        try:
            count = read_file(self.store, key, start, buffers)
        except NotFound as error:
            raise IntegrityError(
                f"{self.where}: file {key} is missing", kind=ErrorKind.MISSING_FILE
            ) from error
        if count != sum(map(len, buffers)):
            raise IntegrityError(
                f"{self.where}: file {key} ends at byte {start + count}, "
                f"{entry.nbytes} were committed",
                kind=ErrorKind.TRUNCATED,
            )

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """Compare bytes of file number `file` with their digests; see `Source.compare`.

        Raises:
            IntegrityError: a block differs from its digest; names it.
        """
        entry = self.index.files[file]
        first = start // BLOCK_BYTES
        found = block_digests(*buffers)
        stored = entry.blocks[8 * first : 8 * first + len(found)]
        if found != stored:
            bad = next(i for i in range(0, len(found), 8) if found[i : i + 8] != stored[i : i + 8])
            block = first + bad // 8
            raise IntegrityError(
                f"{self.where}: file {self._key(entry)}, block {block} (bytes "
                f"{block * BLOCK_BYTES} to {min((block + 1) * BLOCK_BYTES, entry.nbytes)}) differs "
                "from its digest: the data was damaged after it was written"
            )

    def read_objects(self, part: str, *, rank: int) -> dict[str, bytes]:
        """Return the encoded Python values of `part` by name: shared ones and those of `rank`.

        Raises:
            IntegrityError: see `read_object`; or a value is stored twice.
        """
        where = f"part {part!r} of {self.where}"
        known: dict[str, bytes] = {}
        for entry in self.index.objects:
            if entry.part != part or entry.rank not in (None, rank):
                continue
            found = document.decode(self.read_object(entry), where=where)
            twice = sorted(found.keys() & known.keys())
            if twice:
                raise IntegrityError(
                    f"{where}: value {twice[0]!r} is stored twice", kind=ErrorKind.MALFORMED
                )
            known.update(found)
        return known

    def read_object(self, entry: ObjectEntry) -> bytes:
        """Return the encoded Python values under `entry`, verified.

        Raises:
            IntegrityError: see `read_blocks`.
        """
        stop = entry.offset + entry.nbytes
        first = entry.offset // BLOCK_BYTES * BLOCK_BYTES
        last = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, self.index.files[entry.file].nbytes)
        data = bytes(self._blocks(entry.file, first, last)[entry.offset - first : stop - first])
        if bytes_digest(data) != entry.digest:
            raise IntegrityError(
                f"{self.where}: the values of part {entry.part!r} differ from their digest"
            )
        return data

    def _blocks(self, file: int, start: int, stop: int) -> memoryview:
        """Do as `read_blocks`, and keep them for the next call if they are few.

        Thousands of values lie in one block, which is read and verified once for all in a row.
        """
        kept_file, kept_start, kept = self._kept  # one look: another thread may replace it
        if kept_file == file and kept_start <= start and stop <= kept_start + len(kept):
            return kept[start - kept_start : stop - kept_start]
        data = self.read_blocks(file, start, stop)
        if len(data) <= _KEPT_BYTES:
            self._kept = file, start, data
        return data

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

    def _key(self, entry: FileEntry) -> str:
        return file_key(self.step, self.manifest.save_id, entry.name)

    def _check_index_bytes(self) -> None:
        committed = self.manifest.index
        if len(self.index_bytes) != committed.nbytes:
            raise IntegrityError(
                f"{self.where}: index {committed.key} holds {len(self.index_bytes)} bytes, "
                f"committed were {committed.nbytes}",
                kind=ErrorKind.TRUNCATED,
            )
        if bytes_digest(self.index_bytes) != committed.digest:
            raise IntegrityError(f"{self.where}: index {committed.key} differs from its digest")

    def _check_parts_agree(self) -> None:
        described = {entry.part for entry in self.index.tensors}
        described |= {entry.part for entry in self.index.objects}
        unlisted = sorted(described - set(self.manifest.parts))
        if unlisted:
            raise IntegrityError(
                f"{self.where}: the index has parts that the manifest does not list: "
                f"{', '.join(unlisted)}",
                kind=ErrorKind.MALFORMED,
            )

    def _check_files_agree(self) -> None:
        prefix = f"{self.manifest.save_id}/"
        listed = {(f.key, f.nbytes, f.digest) for f in self.manifest.files}
        indexed = {(prefix + f.name, f.nbytes, f.digest) for f in self.index.files}
        if listed != indexed:
            keys = sorted(key for key, _, _ in listed ^ indexed)
            raise IntegrityError(
                f"{self.where}: manifest and index disagree about {', '.join(keys[:3])}",
                kind=ErrorKind.MALFORMED,
            )
