"""One rank's share of one save, as the background writer carries it out."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dist_ckpt import events
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    StorageError,
    as_ours,
    describe,
)
from dist_ckpt.planning.index import Document
from dist_ckpt.ranks.coordinator import LOST, Coordinator, Deadline, Decide, Topic
from dist_ckpt.ranks.messages import pack
from dist_ckpt.repository import Transaction
from dist_ckpt.saving.cancellation import Stop
from dist_ckpt.saving.file_writer import FileWriter
from dist_ckpt.saving.handle import SaveHandle, SaveHooks
from dist_ckpt.saving.messages import Report
from dist_ckpt.saving.progress import ProgressMeter, SaveProgress
from dist_ckpt.saving.stager import Staged


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank gives to a save.

    Attributes:
        staged: the images of its files, or the error that kept them from being made.
        documents: the encoded values among its files.
        stall_seconds: how long the training step waited for it.
    """

    staged: Staged | BaseException
    documents: Sequence[Document] = ()
    stall_seconds: float = 0.0


class Attempt:
    """What the writer thread needs of a save, and nothing of the live state.

    Args:
        transaction: where the files go.
        coordinator: of the writer thread.
        topic: the round in which ranks report.
        deadline: when the save is over in any case.
        metrics: what this rank was given; those of rank 0 are stored.
        overdue: see `SaveHooks`.

    Attributes:
        stop: what ends it before its time.
        meter: how far this rank is.
        files: writes the files of this rank.
        handle: what the caller holds.
    """

    def __init__(
        self,
        transaction: Transaction,
        coordinator: Coordinator,
        *,
        topic: Topic,
        deadline: Deadline,
        metrics: Mapping[str, float],
        overdue: Callable[[Attempt], CheckpointError | None],
    ) -> None:
        self.transaction = transaction
        self.topic = topic
        self.deadline = deadline
        self.metrics = metrics
        self.rank = coordinator.rank
        self.stop = Stop(coordinator, topic)
        self.meter = ProgressMeter(self._tell)
        self.files = FileWriter(transaction, rank=self.rank, stop=self.stop, meter=self.meter)
        hooks = SaveHooks(
            overdue=lambda: overdue(self),
            announce=self._announce,
            cancel=self.stop.cancel,
            progress=lambda: self.meter.now,
        )
        self.handle = SaveHandle(transaction.step, transaction.save_id, deadline, hooks)
        self._coordinator = coordinator
        self._stall_seconds = 0.0
        self._commit_seconds = 0.0

    def late(self) -> CoordinationError:
        """Return the error of a save whose writer on this rank does not come back."""
        return CoordinationError(
            f"{self.topic.label}: the writer of rank {self.rank} did not finish within "
            f"{self.deadline.span_seconds:g} s",
            kind=ErrorKind.TIMEOUT,
            ranks={self.rank: "its writer did not finish"},
        )

    def run(self, share: Share, decide: Decide) -> None:
        """Write, report, and learn the outcome. Ends the handle; never raises."""
        error: Exception | None = None
        message = self._report(share)
        self.meter.enter("committing")
        begun = time.perf_counter()
        try:
            self._coordinator.round(self.topic, message, decide, deadline=self.deadline)
        except Exception as failure:
            error = failure
        except BaseException as failure:  # a thread has nobody above it: the handle must hear of it
            # Not as it is: what ends a thread would end the program of whoever waits for it.
            error = StorageError(
                f"{self.topic.label}: the writer of rank {self.rank} was ended by "
                f"{describe(failure)}",
                ranks={self.rank: describe(failure)},
            )
            error.__cause__ = failure
        self._commit_seconds = time.perf_counter() - begun
        self.meter.enter("done")
        self.handle.finish(error)
        if error is not None and self._is_void():
            # At once, not after the next commit: there may be no room for another one. What cannot
            # be removed now is garbage by then.
            with suppress(Exception):
                self.transaction.discard()

    def _is_void(self) -> bool:
        """Whether nothing can let this checkpoint come into being any more.

        Only where rank 0 said so: of any other failure it is not known whether it still commits.
        """
        if self.rank == 0:
            return not self.transaction.may_exist
        said = self._coordinator.verdict(self.topic)
        return said is not None and said.kind is not ErrorKind.IN_DOUBT and said.ranks != LOST

    def _report(self, share: Share) -> bytes | BaseException:
        """Write this rank's files; return the report, or what went wrong for others to hear."""
        if isinstance(share.staged, BaseException):
            return share.staged
        try:
            share.staged.wait()
            self.meter.enter("writing")
            self.files.write(share.staged.files)
            self._stall_seconds = share.stall_seconds
            return pack(
                Report(
                    self.files.written,
                    list(share.documents),
                    share.stall_seconds,
                    self.files.seconds,
                    host=socket.gethostname(),
                    metrics=dict(self.metrics),
                )
            )
        except BaseException as error:  # whatever it is, the others are waiting to hear of it
            return error

    def _announce(self, error: Exception | None) -> None:
        """Tell the listeners of this process how the save ended."""
        where = (self.transaction.store.url, self.transaction.step, self.rank)
        save_id = self.transaction.save_id
        if error is None:
            events.emit(
                events.SaveCommitted(
                    *where,
                    save_id=save_id,
                    nbytes=self.files.nbytes,
                    stall_seconds=self._stall_seconds,
                    write_seconds=self.files.seconds,
                    commit_seconds=self._commit_seconds,
                )
            )
        elif self.handle.cancelled:
            events.emit(events.SaveCancelled(*where, save_id=save_id))
        else:
            what = f"the save of step {self.transaction.step} to {where[0]} failed"
            self.handle.tell_at_exit(f"{what}, and nobody waited for it: {describe(error)}")
            events.emit(events.SaveFailed(*where, as_ours(error)))

    def _tell(self, progress: SaveProgress) -> None:
        events.emit(
            events.SaveProgressed(
                self.transaction.store.url,
                self.transaction.step,
                self.rank,
                save_id=self.transaction.save_id,
                phase=progress.phase,
                nbytes_done=progress.nbytes_done,
                nbytes_total=progress.nbytes_total,
            )
        )
