"""What rank 0 does when every rank has reported: check, describe, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format import root as root_format
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, longest
from dist_ckpt.format.root import SegmentNote, Spent
from dist_ckpt.planning.index import IndexPlan, versions
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.repository import Transaction
from dist_ckpt.saving.messages import Report
from dist_ckpt.saving.metrics import tell_differing
from dist_ckpt.saving.provenance import SaveContext


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
        root = root_format.encode(
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
