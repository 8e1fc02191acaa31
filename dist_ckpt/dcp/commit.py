"""What rank 0 does with the results of a stock save: check, describe, commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from torch.distributed.checkpoint.planner import SavePlan

from dist_ckpt.dcp.items import described
from dist_ckpt.foreign.dcp_runs import NAMING, NAMING_VERSION
from dist_ckpt.format.manifest import Manifest, ManifestFile, RankTimings
from dist_ckpt.planning.index import Document, RankShare, WrittenFile, build_index, versions
from dist_ckpt.repository import Transaction


class StockReport(msgspec.Struct, frozen=True):
    """What a rank wrote: its files and Python values, and how long it took."""

    save_id: str
    files: list[WrittenFile]
    documents: list[Document]
    stage_seconds: float
    write_seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, slots=True)
class StockAttempt:
    """An attempt between its plans and its results."""

    transaction: Transaction
    plans: Sequence[SavePlan]

    def commit(
        self,
        reports: Sequence[StockReport],
        *,
        metrics: Mapping[str, float],
        metadata: Mapping[str, Any],
    ) -> None:
        """Make the checkpoint exist, given the report of each rank.

        Raises:
            IntegrityError: a rank wrote other files than were planned.
            FencedError: a newer claim owns the run; nothing was committed.
            AlreadyExists: another attempt committed the step.
            StorageError: the commit did not take effect.
        """
        transaction = self.transaction
        shares = [
            RankShare(*described(plan), report.files, report.documents)
            for plan, report in zip(self.plans, reports, strict=True)
        ]
        index = build_index(shares)
        parts = [tensor.part for tensor in index.tensors]
        parts += [entry.part for entry in index.objects]

        def manifest(stored_index: ManifestFile) -> Manifest:
            return Manifest(
                step=transaction.step,
                save_id=transaction.save_id,
                claim=transaction.claim,
                created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                world_size=len(reports),
                versions=versions() | {NAMING: NAMING_VERSION},
                parts=list(dict.fromkeys(parts)),
                files=[
                    ManifestFile(f"{transaction.save_id}/{file.name}", file.nbytes, file.digest)
                    for file in index.files
                ],
                index=stored_index,
                metrics=dict(metrics),
                metadata=dict(metadata),
                timings={str(rank): _timings(report) for rank, report in enumerate(reports)},
                parent_step=None,
            )

        transaction.commit(index, manifest)


def _timings(report: StockReport) -> RankTimings:
    return RankTimings(
        stage_seconds=report.stage_seconds,
        write_seconds=report.write_seconds,
        nbytes=report.nbytes,
    )
