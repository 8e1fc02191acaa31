"""The commit by rank 0 when every rank has reported, and what is done after it for the folder.

Rank 0 does it; where each host has a folder of its own, the rank that leads the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dist_ckpt import events
from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError, as_ours
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, longest
from dist_ckpt.format.segments import SegmentNote, Spent, encode_root
from dist_ckpt.planning.files import IndexPlan, versions
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.history import EpochNote, History, put_epoch_note
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.saving.messages import Report
from dist_ckpt.saving.provenance import Metrics, SaveContext, as_numbers, tell_differing
from dist_ckpt.threads import WriterThread

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything rank 0 knows of an attempt before the reports arrive.

    `plan` is the number of the plan, `inside` returns the segment of rank 0. `confirm` raises if
    the save may not be committed any more: other ranks may have given up.
    """

    transaction: Transaction
    job: Job
    plan: int
    index: IndexPlan
    inside: Callable[[], bytes]
    parts: Sequence[str]
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    parent_step: int | None
    confirm: Callable[[], None]
    about: SaveContext = field(default_factory=SaveContext)

    def decide(self, messages: Sequence[bytes]) -> bytes:
        """Commit, given the report of each rank; the answer to all ranks is empty.

        Raises:
            IntegrityError: a rank wrote by another plan.
            FencedError: a newer claim owns the run.
            AlreadyExists: another attempt committed the step.
            CoordinationError: the save was cancelled, or it is too late.
            StorageError: the commit did not take effect.
        """
        root, draft = self.describe(messages)
        self.transaction.commit(
            root,
            draft,
            confirm=self.confirm,
            replaces=self.job.passed_over.manifest(self.transaction.step),
        )
        self.job.committed(self.transaction.step)
        return b""

    def describe(self, messages: Sequence[bytes]) -> tuple[bytes, Manifest]:
        """Check the report of each rank; return the encoded root, and the draft of the manifest.

        Raises:
            IntegrityError: a rank wrote by another plan.
            CoordinationError: the save was cancelled, or it is too late.
        """
        reports = [unpack(data, Report) for data in messages]
        self._check(reports)
        where = (self.transaction.store.url, self.transaction.step)
        tell_differing(*where, reports, self.about.told)
        self.confirm()
        root = encode_root(
            self.index.structure,
            self._segments(reports),
            [Spent(report.stage_seconds, report.write_seconds) for report in reports],
        )
        return root, self._draft(reports)

    def _segments(self, reports: Sequence[Report]) -> list[SegmentNote]:
        found = [report.segment for report in reports if report.segment is not None]
        if found and not found[0].rank:
            found[0] = msgspec.structs.replace(found[0], inside=self.inside())
        return found

    def _check(self, reports: Sequence[Report]) -> None:
        for rank, report in enumerate(reports):
            if report.plan != self.plan:
                why = f"it wrote by plan {report.plan}, not by plan {self.plan}"
                raise IntegrityError(
                    f"rank {rank} wrote other boxes than were planned: {why}",
                    kind=ErrorKind.COVERAGE,
                    ranks={rank: why},
                )

    def _draft(self, reports: Sequence[Report]) -> Manifest:
        transaction = self.transaction
        sizes = [[nbytes for _, nbytes in _files(report)] for report in reports]
        return Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(reports),
            versions=versions(),
            parts=list(self.parts),
            files=FilesTotal.of(nbytes for mine in sizes for nbytes in mine),
            metrics=dict(self.metrics),
            metadata=dict(self.metadata),
            timings=longest(
                [
                    RankTimings(
                        stage_seconds=report.stage_seconds,
                        write_seconds=report.write_seconds,
                        nbytes=sum(mine),
                    )
                    for report, mine in zip(reports, sizes, strict=True)
                ]
            ),
            parent_step=self.parent_step,
            epoch=self.about.epoch,
            origin=self.about.origin([report.host for report in reports]),
        )


def _files(report: Report) -> Sequence[tuple[str, int]]:
    return () if report.segment is None else report.segment.files


# What is done after a commit, once for a folder: retention and garbage, beside later saves.


class Housekeeping:
    """Keeps what a policy keeps and collects garbage, on the rank that leads its folder alone.

    It is no part of a save: none waits for it to begin.

    Attributes:
        litter: whether files of dead attempts may lie around: at the start, after a failed save.
        thread: where it works, beside later saves.
    """

    def __init__(self, job: Job, policy: KeepPolicy | None) -> None:
        """Remember what to keep; None is everything."""
        self._job = job
        self._policy = policy
        self._history = History(job.repository.store)
        self.thread = WriterThread("dist_ckpt-tidy")
        # Looked at while garbage is collected, so it must always hold what is being written.
        self._in_flight: set[str] = set()
        self.litter = True

    def begin(self, step: int) -> str:
        """Open an attempt whose files are no garbage; return its save_id. See `Job.begin`."""
        save_id = self._job.begin(step)
        self.protect(save_id)
        return save_id

    def protect(self, save_id: str) -> None:
        """Take the files of an attempt for no garbage, and those of the one before from now on."""
        # Before the first file of it can be listed, and before the one before is let go.
        before = self._in_flight - {save_id}
        self._in_flight.add(save_id)
        self._in_flight -= before

    def tidy(self, step: int, *, at_once: bool = False) -> None:
        """Tidy up after the commit of `step`, in the background if not at once."""
        if self._job.leads and at_once:
            self.run(step)
        elif self._job.leads:
            self.thread.submit(lambda: self.run(step))

    def run(self, step: int) -> None:
        """Tidy up after the commit of `step`. A failure here never undoes the commit."""
        repository, url = self._job.repository, self._job.url
        try:
            self._retain(step)
            if self.litter:
                # Cleared first: what a save leaves behind meanwhile is for the next time.
                self.litter = False
                claim = self._job.claim()
                for gone in repository.collect_hidden(claim=claim):
                    events.emit(events.CheckpointDeleted(url, gone, 0, "given up by going back"))
                repository.collect(claim=claim, in_flight=self._in_flight)
        except Exception as error:  # a policy of the user may raise anything
            self.litter = True
            failure = as_ours(error)
            events.emit(events.RetentionFailed(url, step, 0, failure))
            _log.warning(
                "tidying %s after step %d failed, the step is committed: %s", url, step, failure
            )

    def note_late(
        self,
        step: int,
        epoch: int | None,
        metrics: Metrics,
        *,
        after: Callable[[Callable[[], None]], None],
    ) -> None:
        """Have said of `step`, once it is committed, what is known only now.

        Args:
            step: which checkpoint.
            epoch: which epoch ended with it.
            metrics: what was given with that.
            after: runs a job when the saves before are over.
        """
        if not self._job.leads:
            return
        try:
            note = EpochNote(epoch, as_numbers(metrics))
        except UsageError as error:
            # Not raised: the other ranks have nothing to convert, and would go on alone.
            self.tell_failed(step, error)
            return
        after(lambda: self.thread.submit(lambda: self.note_epoch(step, note)))

    def note_epoch(self, step: int, note: EpochNote) -> None:
        """Say of the committed `step` what is known only now, then delete what need not be kept.

        A failure is told by an event and the log, not raised: the checkpoint is as good as before.
        """
        store = self._job.repository.store
        try:
            record = self._history.of(step)
            if record is not None:  # else its save failed, and that is told elsewhere
                put_epoch_note(store, step, record.save_id, note)
                self._retain(step)
        except Exception as error:  # a policy of the user may raise anything
            self.tell_failed(step, error)

    def tell_failed(self, step: int, error: Exception) -> None:
        """Say that something about a committed checkpoint could not be noted."""
        failure = as_ours(error)
        events.emit(events.RetentionFailed(self._job.url, step, 0, failure))
        _log.warning("noting metrics of step %d in %s failed: %s", step, self._job.url, failure)

    def _retain(self, step: int) -> None:
        """Delete what need not be kept, now that `step` is committed.

        Raises:
            CheckpointError: a listing or a deletion failed, or a newer job owns the run.
        """
        # It may be a step that was deleted by hand, or passed over, and is another one now.
        self._history.forget(step)
        if self._policy is None:
            return
        origin = self._job.restored_step
        gone = self._job.repository.retain(
            self._policy,
            claim=self._job.claim(),
            protected={step} if origin is None else {step, origin},
            damaged=self._job.passed_over.steps,
            history=self._history,
        )
        for old, reason in gone.items():
            events.emit(events.CheckpointDeleted(self._job.url, old, 0, reason))
