"""What rank 0 does when every rank has reported: check, describe, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dist_ckpt.format.index import Index
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, longest
from dist_ckpt.format.root import Spent
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.planning.describe import Held
from dist_ckpt.planning.holdings import TensorKey
from dist_ckpt.planning.index import RankShare, build_index, versions
from dist_ckpt.planning.owners import Owned
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.repository import Transaction
from dist_ckpt.saving.messages import Report
from dist_ckpt.saving.metrics import tell_differing
from dist_ckpt.saving.provenance import SaveContext


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything rank 0 knows of an attempt before the reports arrive.

    `confirm` raises if the save may not be committed any more: other ranks may have given up.
    """

    transaction: Transaction
    job: Job
    held_by_rank: Sequence[Sequence[Held]]
    owned_by_rank: Sequence[Sequence[Owned]]
    ties: Mapping[TensorKey, str]
    parts: Sequence[str]
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    parent_step: int | None
    confirm: Callable[[], None]
    max_file_bytes: int | None = None
    about: SaveContext = field(default_factory=SaveContext)

    def decide(self, messages: Sequence[bytes]) -> bytes:
        """Commit, given the report of each rank; the answer to all ranks is empty.

        Raises:
            IntegrityError: a rank wrote other files than were planned.
            FencedError: a newer claim owns the run.
            AlreadyExists: another attempt committed the step.
            CoordinationError: the save was cancelled, or it is too late.
            StorageError: the commit did not take effect.
        """
        reports = [unpack(data, Report) for data in messages]
        shares = [
            RankShare(held, owned, report.files, report.documents)
            for held, owned, report in zip(
                self.held_by_rank, self.owned_by_rank, reports, strict=True
            )
        ]
        index = build_index(shares, ties=self.ties, max_file_bytes=self.max_file_bytes)
        where = (self.transaction.store.url, self.transaction.step)
        tell_differing(*where, reports, self.about.told)
        self.confirm()
        self.transaction.commit(
            encode_whole(index, [Spent(r.stage_seconds, r.write_seconds) for r in reports]),
            self._draft(index, reports),
            confirm=self.confirm,
            replaces=self.job.passed_over.manifest(self.transaction.step),
        )
        self.job.committed(self.transaction.step)
        return b""

    def _draft(self, index: Index, reports: Sequence[Report]) -> Manifest:
        transaction = self.transaction
        return Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(reports),
            versions=versions(),
            parts=list(self.parts),
            files=FilesTotal.of(file.nbytes for file in index.files),
            metrics=dict(self.metrics),
            metadata=dict(self.metadata),
            timings=longest(
                [
                    RankTimings(
                        stage_seconds=report.stage_seconds,
                        write_seconds=report.write_seconds,
                        nbytes=sum(file.nbytes for file in report.files),
                    )
                    for report in reports
                ]
            ),
            parent_step=self.parent_step,
            epoch=self.about.epoch,
            origin=self.about.origin([report.host for report in reports]),
        )
