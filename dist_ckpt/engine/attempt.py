"""One rank's share of one save, as the background writer carries it out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dist_ckpt import events
from dist_ckpt.dcp.metadata import Document, WrittenFile
from dist_ckpt.dcp.writer import StagedFile
from dist_ckpt.engine.coordinator import Coordinator, Deadline, Decide, Topic
from dist_ckpt.engine.handle import SaveHandle
from dist_ckpt.engine.messages import Report, pack
from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, describe
from dist_ckpt.format.digest import block_digests
from dist_ckpt.repository import Transaction


@dataclass
class Attempt:
    """What the writer thread needs of a save, and nothing of the live state.

    Attributes:
        transaction: where the files go.
        rank: this rank.
        topic: the round in which ranks report.
        deadline: when the save is over in any case.
        handle: what the caller holds.
        staged: the images of this rank's files, or the error that kept them from being made.
        documents: the encoded values among them.
        stall_seconds: how long the training step waited.
        cancelled: set when the save was given up; nothing is written after that.
        metrics: what this rank was given; those of rank 0 are stored.
        write_seconds: how long this rank took to digest and write its files.
        commit_seconds: how long it then waited for the outcome.
        nbytes: how many bytes it wrote.
    """

    transaction: Transaction
    rank: int
    topic: Topic
    deadline: Deadline
    handle: SaveHandle
    staged: Sequence[StagedFile] | BaseException
    documents: list[Document]
    stall_seconds: float
    cancelled: threading.Event
    metrics: Mapping[str, float] = field(default_factory=dict)
    write_seconds: float = 0.0
    commit_seconds: float = 0.0
    nbytes: int = 0

    def run(self, coordinator: Coordinator, decide: Decide) -> None:
        """Write, report, and learn the outcome. Ends the handle; never raises."""
        error: CheckpointError | None = None
        message = self._report()
        begun = time.perf_counter()
        try:
            coordinator.round(self.topic, message, decide, deadline=self.deadline)
        except CheckpointError as failure:
            error = failure
        except BaseException as failure:  # a thread has nobody above it: the handle must hear of it
            error = CoordinationError(
                f"{self.topic.label}: the writer of rank {self.rank} failed: {describe(failure)}",
                kind=ErrorKind.PEER_FAILED,
                ranks={self.rank: describe(failure)},
            )
            error.__cause__ = failure
        self.commit_seconds = time.perf_counter() - begun
        # The image is not needed any more, whoever keeps the attempt.
        self.staged = ()
        self.handle.finish(error)

    def announce(self, error: CheckpointError | None) -> None:
        """Tell the listeners of this process how the save ended."""
        where = (self.transaction.store.url, self.transaction.step, self.rank)
        if error is not None:
            events.emit(events.SaveFailed(*where, error))
            return
        events.emit(
            events.SaveCommitted(
                *where,
                save_id=self.transaction.save_id,
                nbytes=self.nbytes,
                stall_seconds=self.stall_seconds,
                write_seconds=self.write_seconds,
                commit_seconds=self.commit_seconds,
            )
        )

    def _report(self) -> bytes | BaseException:
        """Write this rank's files; return the report, or what went wrong for others to hear."""
        if isinstance(self.staged, BaseException):
            return self.staged
        begun = time.perf_counter()
        try:
            written = [self._write(file) for file in self.staged]
        except BaseException as error:  # whatever it is, the others are waiting to hear of it
            return error
        self.write_seconds = time.perf_counter() - begun
        return pack(
            Report(
                written,
                self.documents,
                self.stall_seconds,
                self.write_seconds,
                host=socket.gethostname(),
                metrics=dict(self.metrics),
            )
        )

    def _write(self, file: StagedFile) -> WrittenFile:
        if self.cancelled.is_set():
            raise CoordinationError("the save was given up", kind=ErrorKind.TIMEOUT)
        begun = time.perf_counter()
        # Digested before the bytes leave: what storage does to them later cannot go unnoticed.
        blocks = block_digests(file.image)
        key = self.transaction.put_file(file.name, [file.image])
        # From here on the file is durable: a report never speaks of one that is not.
        self.nbytes += len(file.image)
        events.emit(
            events.FileWritten(
                self.transaction.store.url,
                self.transaction.step,
                self.rank,
                save_id=self.transaction.save_id,
                key=key,
                nbytes=len(file.image),
                seconds=time.perf_counter() - begun,
            )
        )
        return WrittenFile(file.name, len(file.image), blocks)
