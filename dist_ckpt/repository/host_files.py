"""The files of one checkpoint in the folders of several hosts: who has which, and what is damaged.

What several hosts have under one name is the same, so a copy that is damaged on one of them is no
reason to give the checkpoint up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.format.names import segment_name
from dist_ckpt.format.root import SegmentNote
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.source import reason
from dist_ckpt.storage.base import Entry, Store
from dist_ckpt.storage.wrapper import StoreWrapper


class HostsStore(StoreWrapper):
    """The folder of this host, and what is known of one checkpoint's files on other hosts.

    What is small was sent here, and is read from memory; of the rest there is the size.

    Args:
        inner: the folder.
        small: bytes by key, of what the folder lacks.
        held: for each host, its files of the checkpoint: bytes by name.
        of_rank: for each rank, the number of its host.
        here: the number of this host.
        folder: in which these files are, with a slash.
    """

    def __init__(
        self,
        inner: Store,
        *,
        small: Mapping[str, bytes],
        held: Sequence[Mapping[str, int]],
        of_rank: Sequence[int],
        here: int,
        folder: str,
    ) -> None:
        super().__init__(inner)
        self._small = small
        self._held = held
        self._of_rank = of_rank
        self._here = held[here]
        self._folder = folder
        self._nbytes = {folder + name: size for named in held for name, size in named.items()}

    def readers(self, name: str) -> list[int]:
        """Return the ranks that can read a file of the checkpoint, ascending."""
        has = [name in named for named in self._held]
        return [rank for rank, host in enumerate(self._of_rank) if has[host]]

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """See `Store.read_into`.

        Raises:
            IncompatibleError: only another host has it, and no exchange was made for it.
        """
        data = self._small.get(key)
        if data is None:
            if key in self._nbytes and key.removeprefix(self._folder) not in self._here:
                raise IncompatibleError(
                    f"{key} is on another host, and names that share memory in the state have "
                    "values of their own in it, which each rank compares alone: give these names "
                    "memory of their own, or load on ranks whose hosts have the file",
                    kind=ErrorKind.STATE_MISMATCH,
                )
            return super().read_into(key, offset, *buffers)
        start = offset
        for buffer in buffers:
            piece = data[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            start += len(piece)
        return start - offset

    def size(self, key: str) -> int:
        """See `Store.size`, of whichever host has it."""
        if key in self._small:
            return len(self._small[key])
        return self._nbytes[key] if key in self._nbytes else super().size(key)

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list_entries`; of the files of the checkpoint, on all hosts."""
        if prefix != self._folder:
            yield from super().list_entries(prefix)
            return
        for key in sorted(self._nbytes):
            yield Entry(key, self._nbytes[key])

    def _around(self, operation: Any, key: str, run: Any) -> Any:
        return run()


class WatchedCheckpoint(Checkpoint):
    """A checkpoint that remembers what of it could not be read here.

    Attributes:
        damaged: by name, the files that this rank found damaged, each with the reason.
    """

    def __init__(
        self, store: Store, manifest_bytes: bytes, index_bytes: bytes, *, step: int
    ) -> None:
        self.damaged: dict[str, str] = {}
        super().__init__(store, manifest_bytes, index_bytes, step=step)

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Checkpoint.read_into`."""
        with self._watching(self.files[file][0]):
            super().read_into(file, start, *buffers)

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Checkpoint.compare`."""
        self.file(file)  # what describes it, which may be damaged, is another file
        with self._watching(self.files[file][0]):
            super().compare(file, start, *buffers)

    def _read_segment(self, note: SegmentNote) -> bytes:
        with self._watching(segment_name(note.rank)):
            return super()._read_segment(note)

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            self.damaged.setdefault(name, reason(self.step, self.store.url, error.message))
            raise


class BadCopies:
    """Rank 0: the copies of files that turned out to be damaged, each on one host of a job."""

    def __init__(self) -> None:
        self._why: dict[tuple[str, int, str], str] = {}

    def add(self, save_id: str, host: int, name: str, why: str) -> bool:
        """Take note of one; tell whether that is news."""
        news = (save_id, host, name) not in self._why
        self._why.setdefault((save_id, host, name), why)
        return news

    def without(self, save_id: str, held: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
        """Return, for each host, what it has of an attempt that was not found damaged."""
        return [
            {name: size for name, size in named.items() if (save_id, host, name) not in self._why}
            for host, named in enumerate(held)
        ]

    def told(self, save_id: str, hosts: Sequence[str], where: str) -> list[str]:
        """Return what there is to say of an attempt that was loaded all the same."""
        return [
            f"{where}: {name} is damaged on {hosts[host]}, another copy was read: {why}"
            for (found, host, name), why in self._why.items()
            if found == save_id
        ]
