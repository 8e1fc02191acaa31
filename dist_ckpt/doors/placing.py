"""Files put at a destination that appears whole or not at all, and read back.

A store has no rename of folders. So the file by which readers know such a folder is put last: until
then there is nothing that any of them would load. A note beside the files says what is being
made; it goes at the end, and lets the same work be gone on with after it was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dist_ckpt.doors.image import WINDOW_BYTES
from dist_ckpt.errors import AlreadyExists, CheckpointError, IntegrityError, NotFound
from dist_ckpt.format.files import block_digests
from dist_ckpt.repository.tally import Tally
from dist_ckpt.storage.base import Store, Stream, Sweeper, put_stream, read_all
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import in_parallel

NOTE = "unfinished-export.json"
# It has the name of every tensor, so it may be long.
_NOTE_LIMIT_BYTES = 1 << 26
# Each has a buffer of a window: 64 MiB, of the 100 MB that an export may take.
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file to be placed: its key, and its bytes as they are made."""

    key: str
    stream: Stream


class _Tallies:
    """What is told of files on their way to `store`: as they are written, and as they are read."""

    def __init__(self, store: Store, files: Sequence[OutFile]) -> None:
        nbytes = sum(file.stream.nbytes for file in files)
        self.writing = Tally(store.url, "writing", nbytes)
        self.reading_back = Tally(store.url, "reading back", nbytes)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a file: where it begins, its size and digests, how much of it nobody compared."""

    start: int
    nbytes: int
    digests: bytes
    unread: int


@dataclass
class _Written:
    """What is known of a stream that goes to a store.

    Attributes:
        stream: what goes there.
        tally: told of what was read back.
        key: what it is called there.
        parts: the size and the digests of each part that was made.
        compared: where the store compared, while it wrote, what it wrote, and how many bytes.
    """

    stream: Stream
    tally: Tally
    key: str
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    compared: dict[int, int] = field(default_factory=dict)

    def watched(self) -> Stream:
        def pieces() -> Iterator[memoryview]:
            # A put that failed begins anew.
            self.parts.clear()
            self.compared.clear()
            for piece in self.stream:
                # Before the store has it: what happens to it from there on shows.
                self.parts += ((part.nbytes, block_digests(part)) for part in _parts(piece))
                yield piece

        return Stream(self.stream.nbytes, pieces, compared=self._note)

    def left(self) -> list[_Part]:
        """Return the parts that are to be read back."""
        found = []
        reached = start = 0
        for nbytes, digests in self.parts:
            # Stores compare in pieces of their own: a part that they cover in half is read back.
            while reached in self.compared:
                reached += self.compared[reached]
            if reached < start + nbytes:
                # What counts as compared, here and by the store, adds up to the size of the file.
                found.append(_Part(start, nbytes, digests, start + nbytes - reached))
                reached = start + nbytes
            start += nbytes
        return found

    def _note(self, start: int, nbytes: int) -> None:
        self.compared[start] = nbytes
        # By its end: where it begins is the end of another one.
        self.tally.note((self.key, start + nbytes), nbytes)


def _parts(piece: memoryview) -> Iterator[memoryview]:
    """Yield `piece` in parts that are read back at once."""
    for start in range(0, piece.nbytes, WINDOW_BYTES):
        yield piece[start : start + WINDOW_BYTES]


def place_one(store: Store, file: OutFile) -> None:
    """Put a single file, which one put makes whole.

    Raises:
        AlreadyExists: there is another one. The same one is what this was to make.
    """
    _sweep(store)
    _put_or_compare(store, file, _Tallies(store, [file]), replace=False)


def place_folder(store: Store, files: Sequence[OutFile], work: Mapping[str, Any]) -> None:
    """Put `files` into a folder that has nothing else, the last one last.

    Args:
        store: the folder.
        files: in the order in which they are put.
        work: what is made of what: as JSON it is equal for the same work only.

    Raises:
        AlreadyExists: there is something, and not from the same work that was cut off.
    """
    sizes = {file.key: file.stream.nbytes for file in files}
    note = msgspec.json.format(msgspec.json.encode({**work, "files": sizes}), indent=2) + b"\n"
    found = _note(store)
    # Without a note, what lies there is no beginning of ours.
    if found is None and store.list_children():
        _check_done(store, files)
        return
    if found not in (None, note):
        raise AlreadyExists(
            f"{store.url} has an export that was cut off and was another one ({NOTE} tells): "
            "remove it, or export elsewhere"
        )
    # First of all: from here on it is known whose files these are, and of which work.
    if found is None:
        store.put(NOTE, [note])
    _sweep(store)
    tallies = _Tallies(store, files)
    try:
        for file in files:
            # What has another content is from a source that was saved anew under the same name.
            _put_or_compare(store, file, tallies, replace=True)
    except CheckpointError:
        # Where no file came of it there is nothing to go on with, and the place is free again.
        if found is None and store.list_children() == [NOTE]:
            store.delete([NOTE])
        raise
    # Last: while it is there the folder counts as unfinished.
    store.delete([NOTE])


def _check_done(store: Store, files: Sequence[OutFile]) -> None:
    """Check that the folder has the files: the work was cut off when all of it was done."""
    tally = _Tallies(store, files).reading_back
    for file in files:
        # By size first: that reads no byte, and most folders of others end here.
        if _size(store, file.key) != file.stream.nbytes or not _is_stored(store, file, tally):
            raise AlreadyExists(
                f"{store.url} is not empty, and has not what this export would make: choose "
                "another place, or empty it"
            )


def _put_or_compare(store: Store, file: OutFile, tallies: _Tallies, *, replace: bool) -> None:
    size = _size(store, file.key)
    # Read and compared, not trusted: the source may be another by now.
    if size == file.stream.nbytes and _is_stored(store, file, tallies.reading_back):
        tallies.writing.note(file.key, size)
        return
    if size is not None and not replace:
        raise AlreadyExists(
            f"{file.key} already exists in {store.url}, with another content: export elsewhere, or "
            "remove it"
        )
    stream = tallies.writing.counted(file.key, file.stream)
    written = _Written(stream, tallies.reading_back, file.key)
    # Where nothing was, what somebody else put this moment is not overwritten.
    put_stream(store, file.key, written.watched(), mode="create" if size is None else "replace")
    _read_back(store, written)


def _read_back(store: Store, written: _Written) -> None:
    """Compare what is stored with what was made, as far as the store did not.

    Raises:
        IntegrityError: they differ; the file is removed.
    """
    left = written.left()
    buffers = [aligned_buffer(WINDOW_BYTES) for _ in range(min(_AT_ONCE, len(left)))]

    def compare(part: _Part) -> None:
        buffer = buffers.pop()  # there is one for each thread
        # Past the end a store gives fewer bytes: of a short file the digests differ.
        count = store.read_into(written.key, part.start, buffer[: part.nbytes])
        if block_digests(buffer[:count]) != part.digests:
            raise IntegrityError(
                f"{written.key} in {store.url} reads otherwise than it was written, around byte "
                f"{part.start}: it was removed. Check the disk or the server"
            )
        buffers.append(buffer)
        written.tally.note((written.key, part.start + part.nbytes), part.unread)

    try:
        # A disk and a server are only as fast as they are asked for several parts at once.
        in_parallel(compare, left, threads=max(1, len(buffers)))
    except IntegrityError:
        # Under this name nobody may find what is known to be wrong.
        store.delete([written.key])
        raise


def _is_stored(store: Store, file: OutFile, tally: Tally) -> bool:
    """Whether the object there is what the stream makes, of which it has the size."""
    buffer = aligned_buffer(WINDOW_BYTES)
    start = 0
    for piece in tally.counted(file.key, file.stream):
        for wanted in _parts(piece):
            count = store.read_into(file.key, start, buffer[: wanted.nbytes])
            if buffer[:count] != wanted:
                return False
            start += count
    return True


def _note(store: Store) -> bytes | None:
    try:
        return read_all(store, NOTE, limit_bytes=_NOTE_LIMIT_BYTES)
    except NotFound:
        return None


def _size(store: Store, key: str) -> int | None:
    try:
        return store.size(key)
    except NotFound:
        return None


def _sweep(store: Store) -> None:
    """Remove what a killed writer left of a file right here: it is half of what is made now."""
    # Not below: a folder in it may be a run, where a writer may be at work.
    if isinstance(store, Sweeper):
        store.sweep(may_go=lambda key: "/" not in key)
