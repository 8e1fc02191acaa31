"""From the arena to the store: digests first, then bytes, several files side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from dist_ckpt import events
from dist_ckpt.dcp.metadata import WrittenFile
from dist_ckpt.dcp.writer import StagedFile
from dist_ckpt.engine.progress import ProgressMeter
from dist_ckpt.engine.stop import Stop
from dist_ckpt.errors import CheckpointError
from dist_ckpt.format.digest import BLOCK_BYTES, block_digests
from dist_ckpt.repository import Transaction
from dist_ckpt.storage.parallel import in_parallel

# While one file is digested the other keeps the disk or the network busy. More would take the
# processors from the training, and nothing is left to be gained: each put has threads of its own.
_FILES_AT_ONCE = 2
_DIGESTED_BYTES = 8 * BLOCK_BYTES


class FileWriter:
    """Writes the files of one rank for one attempt.

    Args:
        transaction: where they go.
        rank: this rank.
        stop: asked before every piece.
        meter: counts the bytes.

    Attributes:
        written: the files that are durable, in the order in which they were given.
        nbytes: how many bytes they have.
        seconds: how long it took to digest and write them, those that were waited for included.
    """

    def __init__(
        self, transaction: Transaction, *, rank: int, stop: Stop, meter: ProgressMeter
    ) -> None:
        self._transaction = transaction
        self._rank = rank
        self._stop = stop
        self._meter = meter
        self._failure: BaseException | None = None
        self._digesting = threading.Lock()
        self.written: list[WrittenFile] = []
        self.seconds = 0.0

    @property
    def nbytes(self) -> int:
        """How many bytes are durable."""
        return sum(file.nbytes for file in self.written)

    def write(self, files: Iterable[StagedFile]) -> None:
        """Digest and store `files`, as they come; each is durable when this returns.

        Raises:
            CheckpointError: the first failure of a put, or why the save is to stop.
        """
        begun = time.perf_counter()
        found: dict[int, WrittenFile] = {}

        def write(numbered: tuple[int, StagedFile]) -> None:
            number, file = numbered
            try:
                found[number] = self._write(file)
            except BaseException as error:
                # The others are not worth their time any more, and their errors not worth telling.
                self._failure = self._failure or error
                self._stop.fail(error)
                raise

        try:
            in_parallel(write, enumerate(files), threads=_FILES_AT_ONCE)
        except BaseException:
            if self._failure is None:  # the source of the files failed, not a put
                raise
        finally:
            self.written += [found[number] for number in sorted(found)]
            self.seconds += time.perf_counter() - begun
        if self._failure is not None:
            raise self._failure  # of several the first, and with the cause that it has

    def discard(self) -> None:
        """Remove what was written for a save that nobody wants; what stays is garbage by now."""
        folder = [self._transaction.key(file.name) for file in self.written]
        with suppress(CheckpointError):
            self._transaction.store.delete(folder)

    def _write(self, file: StagedFile) -> WrittenFile:
        self._stop.check()
        begun = time.perf_counter()
        nbytes = len(file.image)
        # Digested before the bytes leave: what storage does to them later cannot go unnoticed.
        blocks = self._digest(file.image)
        count = self._meter.file(nbytes)

        def watch(piece_bytes: int) -> None:
            self._stop.check()
            count(piece_bytes)

        key = self._transaction.put_file(file.name, [file.image], watch=watch)
        # From here on the file is durable: a report never speaks of one that is not.
        events.emit(
            events.FileWritten(
                self._transaction.store.url,
                self._transaction.step,
                self._rank,
                save_id=self._transaction.save_id,
                key=key,
                nbytes=nbytes,
                seconds=time.perf_counter() - begun,
            )
        )
        return WrittenFile(file.name, nbytes, blocks)

    def _digest(self, image: memoryview) -> bytes:
        digests = []
        # One at a time, since two would take turns at the interpreter lock, and both come late.
        with self._digesting:
            for start in range(0, len(image), _DIGESTED_BYTES):
                self._stop.check()
                digests.append(block_digests(image[start : start + _DIGESTED_BYTES]))
                # A digest holds the interpreter lock: a training step that waits for it goes first.
                time.sleep(0)
        return b"".join(digests)
