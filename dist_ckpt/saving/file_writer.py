"""From the arena to the store: bytes, several files side by side, and their digests meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dist_ckpt import events
from dist_ckpt.format.digest import BLOCK_BYTES, block_digests
from dist_ckpt.planning.files import StagedFile
from dist_ckpt.planning.index import WrittenFile
from dist_ckpt.repository import Transaction
from dist_ckpt.saving.cancellation import Stop
from dist_ckpt.saving.progress import ProgressMeter
from dist_ckpt.storage.parallel import in_parallel

# While one file is begun or made durable the other keeps the disk or the network busy. More would
# gain nothing: each put has threads of its own.
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
        written: the files that are durable and digested, in the order in which they were given.
        nbytes: how many bytes they have.
        seconds: how long it took to write and digest them.
    """

    def __init__(
        self, transaction: Transaction, *, rank: int, stop: Stop, meter: ProgressMeter
    ) -> None:
        self._transaction = transaction
        self._rank = rank
        self._stop = stop
        self._meter = meter
        self.written: list[WrittenFile] = []
        self.seconds = 0.0

    @property
    def nbytes(self) -> int:
        """How many bytes are durable."""
        return sum(file.nbytes for file in self.written)

    def write(self, files: Sequence[StagedFile]) -> None:
        """Store and digest `files`; each is durable when this returns.

        Both at once: what they read nobody can change, so a digest is that of the staged bytes
        whether these have left already or not, and the disk need not wait for it.

        Args:
            files: their images stay as they are until this returns.

        Raises:
            CheckpointError: the first failure of a put, or why the save is to stop.
        """
        begun = time.perf_counter()
        failures: list[BaseException] = []
        digests: list[bytes] = []

        def put(file: StagedFile) -> None:
            try:
                self._put(file)
            except BaseException as error:
                failures.append(error)
                # The others are not worth their time any more, and their errors not worth telling.
                self._stop.fail(error)
                raise

        def put_all() -> None:
            in_parallel(put, files, threads=_FILES_AT_ONCE)

        def digest_all() -> None:
            digests.extend(self._digest(file.image) for file in files)

        try:
            # In this order, should there be no second thread to be had.
            in_parallel(lambda work: work(), [put_all, digest_all], threads=2)
        except BaseException:
            if not failures:  # a digest was stopped
                raise
        finally:
            self.seconds += time.perf_counter() - begun
        if failures:
            raise failures[0]  # of several the first, and with the cause that it has
        for file, blocks in zip(files, digests, strict=True):
            self.written.append(WrittenFile(file.name, len(file.image), blocks))

    def _put(self, file: StagedFile) -> None:
        self._stop.check()
        begun = time.perf_counter()
        # Read-only, so that no store can change what is being digested.
        image = file.image.toreadonly()
        count = self._meter.file(len(image))

        def watch(piece_bytes: int) -> None:
            self._stop.check()
            count(piece_bytes)

        key = self._transaction.put_file(file.name, [image], watch=watch)
        # From here on the file is durable: a report never speaks of one that is not.
        events.emit(
            events.FileWritten(
                self._transaction.store.url,
                self._transaction.step,
                self._rank,
                save_id=self._transaction.save_id,
                key=key,
                nbytes=len(image),
                seconds=time.perf_counter() - begun,
            )
        )

    def _digest(self, image: memoryview) -> bytes:
        """Return the joined digests of the blocks of `image`."""
        digests = []
        for start in range(0, len(image), _DIGESTED_BYTES):
            self._stop.check()
            digests.append(block_digests(image[start : start + _DIGESTED_BYTES]))
            # A digest holds the interpreter lock: a training step that waits for it goes first.
            time.sleep(0)
        return b"".join(digests)
