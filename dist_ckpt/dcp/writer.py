"""A storage writer for torch.distributed.checkpoint: real checkpoints under the stock entry points.

The stock protocol is a plan round and a write round, both of which carry errors to every rank, so
no round of our own is needed: rank 0 begins the attempt while it has all plans, and commits when
it has all results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dist_ckpt import events
from dist_ckpt.dcp.commit import StockAttempt, StockReport
from dist_ckpt.dcp.edge import CheckpointId, Place, names_step, open_store, plain_errors, step_of
from dist_ckpt.dcp.items import described, without_empty
from dist_ckpt.dcp.plan_cache import forget, forget_global, whole_global, whole_local
from dist_ckpt.dcp.share import file_images, resolve_share
from dist_ckpt.dcp.tree import TREE_FILE, tree_image
from dist_ckpt.errors import CheckpointError, UsageError, without_secrets
from dist_ckpt.format.digest import block_digests
from dist_ckpt.format.names import check_step
from dist_ckpt.planning.index import WrittenFile
from dist_ckpt.repository import Repository, Transaction

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a rank was asked to save, on its way to rank 0."""

    step: int
    url: str


@dataclass(frozen=True, slots=True)
class _Assigned:
    """Which attempt a rank writes for, and as whom, on its way back."""

    step: int
    save_id: str
    rank: int


class Writer(StorageWriter):
    """Writes a checkpoint of dist_ckpt under `torch.distributed.checkpoint.save` and `async_save`.

    ```python
    import dist_ckpt
    import torch
    import torch.distributed.checkpoint as dcp

    state_dict = {"model": torch.nn.Linear(4, 1).state_dict()}
    dcp.save(state_dict, storage_writer=dist_ckpt.dcp.Writer("runs/17", step=1000))
    ```

    What the stock entry points do not have comes with it: the checkpoint exists only when every
    rank has written its share, every byte has a digest, Python values are stored as typed JSON and
    never as pickles, and a job that was replaced can no longer commit.

    A Writer takes the run over at its first save. One may serve all saves of a program, one after
    another, `checkpoint_id` then being the step. With the plan cache of the stock planner
    (`enable_plan_caching`) plans are made anew at each save all the same.
    """

    def __init__(
        self,
        url: Place,
        *,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe the checkpoint; nothing is written or asked of other ranks yet.

        Args:
            url: the run: a path, a URL, or a `Store`; the same on every rank.
            step: under which step; a committed one is never overwritten.
            metrics: numbers by name, stored in the manifest.
            metadata: any JSON, stored in the manifest.

        Raises:
            UsageError: the place or the step is malformed.
        """
        self._step = check_step(step)
        self._metrics = dict(metrics or {})
        self._metadata = dict(metadata or {})
        self._repository = Repository(open_store(url))
        self._claim: int | None = None
        # By save_id: nothing tells a writer that its attempt failed on another rank, and what such
        # an attempt left here must never be taken for the next one's.
        self._attempts: dict[str, StockAttempt] = {}
        self._litter = True

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Choose the step of the next save, if `checkpoint_id` names one: a number as text.

        Raises:
            UsageError: it is a path that leads out of the run, or anything else that is no step.
        """
        if checkpoint_id is not None:
            step = step_of(checkpoint_id, self._repository.store)
            self._step = self._step if step is None else step

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Tell whether `checkpoint_id` names a step."""
        return names_step(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Begin; see `StorageWriter.set_up_storage_writer`.

        Raises:
            UsageError: with `use_collectives=False`, every rank would commit the step by itself.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False leaves every rank to itself, and one checkpoint of all "
                "ranks cannot come of that: leave it out"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Say what this rank was asked to save; see `StorageWriter.prepare_local_plan`.

        Raises:
            UsageError: a tensor cannot be stored, or the planner keeps its plan to itself.
        """
        with plain_errors():
            plan = whole_local(plan)
            described(plan)
        return replace(plan, storage_data=_Asked(self._step, self._repository.store.url))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: begin the attempt; see `StorageWriter.prepare_global_plan`.

        Raises:
            UsageError: the ranks were asked to save different things.
            AlreadyExists: the step is committed.
            FencedError: another job has taken the run over.
        """
        with plain_errors():
            try:
                plans = whole_global(plans)
            finally:
                forget_global(_Asked)
            _check_same([plan.storage_data for plan in plans])
            if self._claim is None:
                self._claim = self._repository.claim()
            transaction = self._repository.begin(self._step, self._claim)
            whole = without_empty(plans)
            self._attempts[transaction.save_id] = StockAttempt(transaction, whole)
            return [
                replace(plan, storage_data=_Assigned(self._step, transaction.save_id, rank))
                for rank, plan in enumerate(whole)
            ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, durably; see `StorageWriter.write_data`.

        Raises:
            UsageError: a value or a tensor cannot be stored; the message has its path.
            StorageError: a file could not be stored whole.
        """
        forget(planner)
        with plain_errors():
            report = self._write(plan, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(""), report.nbytes, report)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0: commit; see `StorageWriter.finish`.

        Raises:
            IntegrityError: a rank wrote other files than were planned.
            FencedError: a newer claim owns the run; nothing was committed.
            AlreadyExists: another attempt committed the step.
            StorageError: the commit did not take effect.
        """
        with plain_errors():
            reports: list[StockReport] = [result.storage_data for (result,) in results]
            attempt = self._attempts.pop(reports[0].save_id)
            begun = time.perf_counter()
            image = tree_image(metadata)
            if image is not None:
                tree = _put(attempt.transaction, 0, TREE_FILE, image)
                reports[0] = msgspec.structs.replace(reports[0], tree=tree)
            attempt.commit(reports, metrics=self._metrics, metadata=self._metadata)
            self._announce(attempt.transaction, reports[0], time.perf_counter() - begun)
            self._tidy(attempt.transaction)

    def _write(self, plan: SavePlan, planner: SavePlanner) -> StockReport:
        assigned = plan.storage_data
        transaction = Transaction(self._repository.store, assigned.step, assigned.save_id)
        begun = time.perf_counter()
        share = resolve_share(plan, planner)
        staging = time.perf_counter() - begun
        files: list[WrittenFile] = []
        for name, image in file_images(assigned.rank, share):
            files.append(_put(transaction, assigned.rank, name, image))
            del image  # before the next one is made: memory for one is all that this takes
        writing = time.perf_counter() - begun - staging
        return StockReport(assigned.save_id, files, share.described_documents(), staging, writing)

    def _announce(
        self, transaction: Transaction, report: StockReport, commit_seconds: float
    ) -> None:
        events.emit(
            events.SaveCommitted(
                transaction.store.url,
                transaction.step,
                0,
                save_id=transaction.save_id,
                nbytes=report.nbytes,
                stall_seconds=report.stage_seconds,
                write_seconds=report.write_seconds,
                commit_seconds=commit_seconds,
            )
        )

    def _tidy(self, transaction: Transaction) -> None:
        """Remove what dead attempts left, once; a failure here never undoes the commit."""
        if not self._litter:
            return
        try:
            self._repository.collect(claim=transaction.claim, in_flight=self._attempts.keys())
            self._litter = False
        except CheckpointError as error:
            url, step = without_secrets(transaction.store.url), transaction.step
            events.emit(events.RetentionFailed(url, step, 0, error))
            _log.warning(
                "tidying %s after step %d failed, the step is committed: %s", url, step, error
            )


def _put(transaction: Transaction, rank: int, name: str, image: memoryview) -> WrittenFile:
    """Store one file, durably, and tell the listeners of it."""
    begun = time.perf_counter()
    # Digested before the bytes leave: what storage does to them later cannot go unnoticed.
    blocks = block_digests(image)
    key = transaction.put_file(name, [image])
    events.emit(
        events.FileWritten(
            transaction.store.url,
            transaction.step,
            rank,
            save_id=transaction.save_id,
            key=key,
            nbytes=len(image),
            seconds=time.perf_counter() - begun,
        )
    )
    return WrittenFile(name, len(image), blocks)


def _check_same(asked: Sequence[_Asked]) -> None:
    for rank, each in enumerate(asked):
        if each != asked[0]:
            raise UsageError(
                f"rank 0 was asked to save step {asked[0].step} to {asked[0].url} and rank {rank} "
                f"step {each.step} to {each.url}: give every rank's Writer the same arguments"
            )
