"""Saves, from the call to the commit: agree and stage at once, write in the background."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from multiprocessing.util import Finalize
from typing import Any

from dist_ckpt import events
from dist_ckpt.dcp.writer import StagedFile, plan_files, stage
from dist_ckpt.engine.about import About
from dist_ckpt.engine.attempt import Attempt
from dist_ckpt.engine.commit import Commit
from dist_ckpt.engine.coordinator import Decide
from dist_ckpt.engine.handle import SaveHandle
from dist_ckpt.engine.job import Job
from dist_ckpt.engine.messages import RankPlan
from dist_ckpt.engine.metrics import Metrics, as_numbers
from dist_ckpt.engine.planning import Planner
from dist_ckpt.engine.retention import Retention
from dist_ckpt.engine.snapshot import Snapshot, take
from dist_ckpt.engine.writer_thread import WriterThread
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    UsageError,
    from_wire,
    to_wire,
)
from dist_ckpt.format.names import check_step
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.marks import EpochNote
from dist_ckpt.staging.arena import Arena
from dist_ckpt.state.train_state import TrainState

_log = logging.getLogger("dist_ckpt")


class Saver:
    """Saves the state of one job, one save in flight at a time."""

    def __init__(
        self, job: Job, state: TrainState, *, keep: KeepPolicy | None, metadata: Mapping[str, Any]
    ) -> None:
        self._job = job
        self._state = state
        self.retention = Retention(job, keep)
        self._metadata = dict(metadata)
        self._planner: Planner | None = None
        self._arena = Arena()
        self._writer = WriterThread()
        self._pending: SaveHandle | None = None
        # Set while files of dead attempts may lie around: at the start, and after a failed save.
        self._litter = True
        self._last = False
        self._at_exit = _close_at_exit(self)

    def start(self, step: int, metrics: Metrics, about: About | None = None) -> SaveHandle:
        """Begin to save; return when the state may change again.

        Raises:
            CheckpointError: the ranks could not agree; the same on every rank. Also the failure of
                the save before, when nobody was told of it yet.
        """
        begun = time.perf_counter()
        if self._planner is None:
            self._planner = Planner(self._job.training)
        failed = self.settle()
        # Only now: the time that the save before took is not taken from this one.
        deadline = self._job.deadline()
        topic = self._job.topic("save", f"save of step {step}")
        # A failure goes where a snapshot would: the other ranks wait for this one in the round.
        snapshot = failed or self._snapshot(step, metrics)
        save_id, plan = self._planner.agree(
            step, self._job.url, snapshot, self._begin, topic=topic, deadline=deadline
        )
        assert isinstance(snapshot, Snapshot)  # `agree` raised whatever else it was
        cancelled = threading.Event()
        commit_topic = topic.phase("commit")
        attempt = Attempt(
            Transaction(self._job.repository.store, step, save_id),
            self._job.training.rank,
            commit_topic,
            deadline,
            SaveHandle(
                step,
                save_id,
                deadline,
                overdue=lambda: self._overdue(attempt),
                announce=lambda error: attempt.announce(error),
            ),
            *self._stage(snapshot, plan),
            stall_seconds=0.0,
            cancelled=cancelled,
            metrics=as_numbers(metrics),
        )
        decide = self._commit(attempt, about or About()).decide
        attempt.stall_seconds = time.perf_counter() - begun
        self._emit_staged(attempt)
        # Known before it is submitted: from then on somebody has to wait for it.
        self._pending = attempt.handle
        self._writer.submit(lambda: self._run(attempt, decide))
        return attempt.handle

    def start_last(self, step: int, metrics: Mapping[str, float]) -> SaveHandle:
        """Begin the only save of this job; when it is over everything is released. See `start`."""
        self._last = True
        try:
            return self.start(step, metrics)
        except BaseException:
            self._release()
            raise

    def note_epoch(self, step: int, epoch: int, metrics: Metrics) -> None:
        """Say of the checkpoint of `step`, once it is committed, what is known only now."""
        if self._job.training.rank == 0:
            try:
                note = EpochNote(epoch, as_numbers(metrics))
            except UsageError as error:
                # Not raised: the other ranks have nothing to convert, and would go on alone.
                self.retention.tell_failed(step, error)
                return
            self._writer.submit(lambda: self.retention.note_epoch(step, note))

    def drain(self) -> None:
        """Wait until the save in flight and the retention after it are over.

        Raises:
            CheckpointError: the save failed, and nobody was told of it yet.
        """
        error = self.settle()
        if error is not None:
            raise error

    def settle(self) -> CheckpointError | None:
        """Do as `drain`, but return the failure, so that all ranks hear of it in the next round."""
        handle = self._pending
        if handle is None:
            return None
        handle.settle()
        self._writer.wait_idle(self._job.timeout_seconds)
        # Last: when an interrupt ends the waiting, the writer may still be reading the arena.
        self._pending = None
        return handle.take_error()

    def close(self) -> None:
        """Drain, then let the thread and the other ranks go; see `drain`."""
        # An interrupt here releases nothing: the end of the process waits for the save once more.
        error = self.settle()
        self._release()
        if error is not None:
            raise error

    def _release(self) -> None:
        self._writer.stop()
        self._job.leave()
        # Last: until rank 0 has left, the end of its interpreter would cut the others off.
        self._at_exit.cancel()

    def _snapshot(self, step: int, metrics: Metrics) -> Snapshot | Exception:
        # Returned, not raised: the other ranks wait in a round, and must hear of it.
        try:
            check_step(step)
            as_numbers(metrics)
            return take(self._state, world_size=self._job.training.world_size)
        except Exception as error:
            return error

    def _begin(self, step: int) -> str:
        return self._job.repository.begin(step, self._job.claim()).save_id

    def _stage(
        self, snapshot: Snapshot, plan: RankPlan
    ) -> tuple[list[StagedFile] | Exception, list[Any]]:
        rank = self._job.training.rank
        try:
            files = plan_files(rank, snapshot.held, plan.owned)
            documents = snapshot.documents(plan.objects)
            staged = stage(
                self._arena, rank=rank, local=snapshot.local, plans=files, documents=documents
            )
            return staged, snapshot.describe_documents(documents)
        except Exception as error:
            return error, []

    def _commit(self, attempt: Attempt, about: About) -> Commit:
        assert self._planner is not None
        return Commit(
            transaction=attempt.transaction,
            held_by_rank=self._planner.held_by_rank,
            owned_by_rank=self._planner.owned_by_rank,
            parts=list(self._state.parts),
            metrics=attempt.metrics,
            metadata=self._metadata,
            parent_step=self._job.restored_step,
            deadline=attempt.deadline.for_coordinator(),
            cancelled=attempt.cancelled,
            about=about,
        )

    def _run(self, attempt: Attempt, decide: Decide) -> None:
        """The background job: write and commit, then tidy up."""
        attempt.run(self._job.coordinators.writer, decide)
        if attempt.handle.failed:
            self._litter = True
        elif self._job.training.rank == 0:
            self._tidy(attempt.transaction.step)
        if self._last:
            self._release()

    def _tidy(self, step: int) -> None:
        """Rank 0, after a commit: retention and garbage. A failure here never undoes the commit."""
        repository, url = self._job.repository, self._job.url
        try:
            self.retention.after(step)
            if self._litter:
                repository.collect(claim=self._job.claim(), in_flight=())
                self._litter = False
        except Exception as error:  # a policy of the user may raise anything
            failure = error if isinstance(error, CheckpointError) else from_wire(to_wire(error))
            events.emit(events.RetentionFailed(url, step, 0, failure))
            _log.warning(
                "tidying %s after step %d failed, the step is committed: %s", url, step, failure
            )

    def _overdue(self, attempt: Attempt) -> CheckpointError | None:
        """Near the deadline: find out how the save ended although the writer has not come back."""
        rank = self._job.training.rank
        error = self._job.training.verdict(attempt.topic)
        if error is None and attempt.deadline.passed:
            error = CoordinationError(
                f"{attempt.topic.label}: the writer of rank {rank} did not finish within "
                f"{attempt.deadline.span_seconds:g} s",
                kind=ErrorKind.TIMEOUT,
                ranks={rank: "its writer did not finish"},
            )
        if error is None or self._writer.wait_idle(0.2):
            return None
        # The thread may hang in the backend for ever: it keeps its arena, and the next save gets a
        # thread and an arena of its own.
        attempt.cancelled.set()
        self._writer.abandon()
        self._arena = Arena()
        self._litter = True
        return error

    def _emit_staged(self, attempt: Attempt) -> None:
        staged = () if isinstance(attempt.staged, BaseException) else attempt.staged
        events.emit(
            events.SaveStaged(
                self._job.url,
                attempt.transaction.step,
                self._job.training.rank,
                save_id=attempt.transaction.save_id,
                nbytes=sum(len(file.image) for file in staged),
                stall_seconds=attempt.stall_seconds,
            )
        )


def _close_at_exit(saver: Saver) -> Finalize[None]:
    """Register that a save in flight is finished before this process goes; `cancel` undoes it."""
    reference = weakref.ref(saver)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    # Not atexit, which the processes of multiprocessing, and so torch's spawn, never come to. In a
    # forked child, which has neither the thread nor the save, it does nothing.
    return Finalize(None, close, exitpriority=10)
