"""What rank 0 does with the results of a stock save: check, describe, commit."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from torch.distributed.checkpoint.planner import SavePlan

from dist_ckpt.dcp.faces import Face, agreed
from dist_ckpt.dcp.items import described, tensors_of
from dist_ckpt.dcp.tree import with_tree
from dist_ckpt.dcp.turns import in_stock_save
from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CheckpointError
from dist_ckpt.foreign.dcp_runs import NAMING, naming_version
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, longest
from dist_ckpt.format.root import Spent
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.planning.describe import Held
from dist_ckpt.planning.index import Document, RankShare, WrittenFile, build_index, versions
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.collect import delete_attempt
from dist_ckpt.waiting import Latch

_LOOK_SECONDS = 0.2


@decodable
class StockReport(msgspec.Struct, frozen=True):
    """What a rank wrote, and how long it took; on rank 0 the file of the tree, too.

    What is several tensors behind one face is in `faces`, by the number of the item in the plan;
    what is large in the Python values is in `aside`.
    """

    save_id: str
    files: list[WrittenFile]
    documents: list[Document]
    stage_seconds: float
    write_seconds: float
    faces: dict[int, Face]
    aside: list[Held]
    tree: WrittenFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.nbytes for file in self.files)


class StockAttempt:
    """An attempt between its plans and its results, on rank 0.

    Args:
        transaction: where the files go.
        plans: by rank; let go of when the save is over.
    """

    def __init__(self, transaction: Transaction, plans: Sequence[SavePlan]) -> None:
        self.transaction = transaction
        self._plans = plans

    def clean_up(self) -> None:
        """Remove what all ranks wrote, unless the checkpoint may exist; for when all have ended.

        What cannot be removed now is garbage for the next job's first save.
        """
        self._plans = ()
        if not self.transaction.may_exist:
            with suppress(CheckpointError):
                store, step = self.transaction.store, self.transaction.step
                delete_attempt(store, step, self.transaction.save_id)

    def clean_up_when(self, over: Latch) -> None:
        """Do so when the save is over: nothing tells a writer that it failed on another rank.

        In a thread: who tells it may be a destructor, which must not wait for a store. And one that
        comes late, where the error is kept or waits for the garbage collection: so stock's own call
        is looked at as well.
        """
        caller = threading.get_ident()
        seen = in_stock_save(caller)  # false if another program follows the protocol

        def wait() -> None:
            while not over.wait(_LOOK_SECONDS):
                if seen and not in_stock_save(caller):
                    break
            self.clean_up()

        threading.Thread(target=wait, name="dist_ckpt-tidy", daemon=True).start()

    def faces(self, reports: Sequence[StockReport]) -> dict[str, Any]:
        """Return what is to be kept of tensors that are several, by flattened name.

        Raises:
            IncompatibleError: their shards do not belong together.
        """
        plans = [tensors_of(plan) for plan in self._plans]
        return agreed(plans, [report.faces for report in reports])

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
            RankShare(
                *described(plan, _boxes(report), report.aside), report.files, report.documents
            )
            for plan, report in zip(self._plans, reports, strict=True)
        ]
        index = with_tree(build_index(shares), reports[0].tree)
        aside = any(report.aside for report in reports)
        parts = [tensor.part for tensor in index.tensors]
        parts += [entry.part for entry in index.objects]

        draft = Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(reports),
            versions=versions() | {NAMING: naming_version(aside=aside)},
            parts=list(dict.fromkeys(parts)),
            files=FilesTotal.of(file.nbytes for file in index.files),
            metrics=dict(metrics),
            metadata=dict(metadata),
            timings=longest([_timings(report) for report in reports]),
            parent_step=None,
        )

        spent = [Spent(each.stage_seconds, each.write_seconds) for each in reports]
        transaction.commit(encode_whole(index, spent), draft)


def _boxes(report: StockReport) -> dict[int, Sequence[Held]]:
    return {number: face.held for number, face in report.faces.items()}


def _timings(report: StockReport) -> RankTimings:
    return RankTimings(
        stage_seconds=report.stage_seconds,
        write_seconds=report.write_seconds,
        nbytes=report.nbytes,
    )
