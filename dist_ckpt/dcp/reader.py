"""A storage reader for torch.distributed.checkpoint: verified byte ranges under the stock load."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dist_ckpt.dcp.catalog import Catalog, catalog
from dist_ckpt.dcp.edge import Place, names_step, open_store, plain_errors, step_of
from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError
from dist_ckpt.format.digest import BLOCK_BYTES
from dist_ckpt.format.names import check_step
from dist_ckpt.loading.fetching import MAX_GAP_BYTES, Fetcher
from dist_ckpt.loading.filling import ReadTargets
from dist_ckpt.loading.ranges import Files
from dist_ckpt.loading.ties import Ties
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.options import TIE_RULES, TieRule
from dist_ckpt.planning.describe import Held, LocalBox
from dist_ckpt.planning.placing import check_as_stock
from dist_ckpt.repository import Repository
from dist_ckpt.repository.checkpoint import unless_deleted
from dist_ckpt.state.layout import dtype_name

_IN_FLIGHT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Opened:
    """Which checkpoint a rank has opened, on its way to rank 0."""

    where: str
    save_id: str


class Reader(StorageReader):
    """Reads a checkpoint of dist_ckpt under `torch.distributed.checkpoint.load`.

    ```python
    import dist_ckpt
    import torch
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Linear(4, 1)
    dist_ckpt.save({"model": model}, "runs/17")
    state_dict = {"model": model.state_dict()}
    dcp.load(state_dict, storage_reader=dist_ckpt.dcp.Reader("runs/17"))
    ```

    Every byte that reaches a tensor is verified, only the bytes that a rank wants are read, and
    nothing stored is executed. A tensor of another dtype than the stored one is refused, where
    stock would convert it without a word.

    Checkpoints of `dist_ckpt.save` and of `Checkpointer` can be read too: their parts are the keys
    of the state dict. What they keep for each rank (random number generators) is left out.
    """

    def __init__(self, url: Place, *, step: int | None = None, ties: TieRule = "refuse") -> None:
        """Describe the checkpoint; nothing is read yet.

        Args:
            url: the run: a path, a URL, or a `Store`; the same on every rank.
            step: which checkpoint, None for the newest. Another one is never taken for it.
            ties: where entries of the state dict share memory and the checkpoint has different
                values for them: "refuse" is an error that names both, before anything is changed;
                "last" lets the last entry have its way.

        Raises:
            UsageError: the place, the step or `ties` is malformed.
        """
        if ties not in TIE_RULES:
            raise UsageError(f"ties is one of {', '.join(TIE_RULES)}, not {ties!r}")
        self._ties: TieRule = ties
        self._step = None if step is None else check_step(step)
        self._repository = Repository(open_store(url))
        self._catalog: Catalog | None = None
        self._failure: CheckpointError | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget what was read; choose the step, if `checkpoint_id` names one.

        Raises:
            UsageError: it is a path, or anything else that is no step.
        """
        self._catalog = self._failure = None
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether `checkpoint_id` names a step."""
        return names_step(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Open the checkpoint; see `StorageReader.read_metadata`.

        A failure is raised when the load goes on, or when the metadata are looked at: stock takes
        any exception here for a checkpoint of one rank alone, and gives up the coordination by
        which the other ranks would hear of it.
        """
        self._catalog = self._failure = None
        try:
            with plain_errors():
                repository, step = self._repository, self._step
                opened = repository.open_latest() if step is None else repository.open(step)
                self._catalog = catalog(opened)
                return self._catalog.metadata()
        except CheckpointError as error:
            self._failure = error
            return _Unreadable(error)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: FBT001
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Begin; see `StorageReader.set_up_storage_reader`.

        Raises:
            NotFound: nothing is committed there, or not this step.
            IntegrityError: the checkpoint is damaged.
            CheckpointError: whatever else kept it from being opened.
        """
        if self._failure is not None:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which checkpoint this rank reads; see `StorageReader.prepare_local_plan`."""
        checkpoint = self._opened.checkpoint
        return replace(plan, storage_data=_Opened(checkpoint.where, checkpoint.manifest.save_id))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Rank 0: see that all ranks read one checkpoint; see `StorageReader.prepare_global_plan`.

        Raises:
            UsageError: they do not.
        """
        opened: Sequence[_Opened] = [plan.storage_data for plan in plans]
        for rank, each in enumerate(opened):
            if each != opened[0]:
                raise UsageError(
                    f"rank 0 reads {opened[0].where} ({opened[0].save_id}) and rank {rank} "
                    f"{each.where} ({each.save_id}): give every rank's Reader the same arguments, "
                    "and a step where checkpoints are being made meanwhile"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors and hand over the values; see `StorageReader.read_data`.

        Raises:
            IncompatibleError: a tensor has another dtype than the stored one; nothing was changed.
            IntegrityError: stored bytes differ from their digest.
            NotFound: the checkpoint was deleted since it was opened.
        """
        with plain_errors(), unless_deleted(self._opened.checkpoint):
            wanted = [item for item in plan.items if item.type == LoadItemType.TENSOR]
            targets = [self._target(item, planner) for item in wanted]
            self._fill(targets)
            for item, target in zip(wanted, targets, strict=True):
                planner.commit_tensor(item, target.local.memory)
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    value = self._opened.values[item.storage_index.fqn]()
                    planner.load_bytes(item, _as_stock_wants(value))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def _opened(self) -> Catalog:
        if self._catalog is None:
            raise UsageError("no checkpoint is open: torch.distributed.checkpoint.load opens it")
        return self._catalog

    def _target(self, item: ReadItem, planner: LoadPlanner) -> Wanted:
        fqn = item.storage_index.fqn
        check_as_stock(getattr(planner, "state_dict", {}).get(fqn), f"tensor {fqn!r}")
        number = self._opened.tensors[fqn]
        tensor = self._opened.checkpoint.index.tensors[number]
        memory = planner.resolve_tensor(item).detach()
        if dtype_name(memory.dtype) != tensor.dtype or memory.device.type == "meta":
            raise IncompatibleError(
                f"{fqn!r} is {tensor.dtype} in {self._opened.checkpoint.where}, and the state dict "
                f"has {dtype_name(memory.dtype)} on {memory.device}: give a tensor of the stored "
                "dtype, with memory; nothing was changed"
            )
        chunk = item.storage_index.offset or torch.Size([0] * len(tensor.shape))
        offsets = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
        sizes = tuple(item.lengths)
        box = Held(tensor.part, tensor.name, tensor.dtype, tensor.shape, offsets, sizes)
        return Wanted(number, LocalBox(box, memory), memory.dtype)

    def _fill(self, wanted: Sequence[Wanted]) -> None:
        checkpoint = self._opened.checkpoint
        ties = Ties(
            checkpoint.index,
            wanted,
            where=checkpoint.where,
            rule=self._ties,
            window_bytes=_IN_FLIGHT_BYTES,
        )
        for number in range(ties.windows):
            self._fetch(ties.window(number))
            ties.settle(number)
        self._fetch(ties.wanted)
        ties.finish()

    def _fetch(self, wanted: Sequence[Wanted]) -> None:
        checkpoint = self._opened.checkpoint
        sizes = [file.nbytes for file in checkpoint.index.files]
        files = Files(sizes, unit_bytes=BLOCK_BYTES, apart_bytes=MAX_GAP_BYTES)
        filling = ReadTargets(checkpoint.index, wanted, files, max_gap_bytes=MAX_GAP_BYTES)
        Fetcher(
            checkpoint, files, filling, verify=True, in_flight_bytes=_IN_FLIGHT_BYTES
        ).fetch_all()


class _Unreadable(Metadata):
    """Metadata of a checkpoint that could not be opened: to look at them is the error."""

    def __init__(self, error: CheckpointError) -> None:
        self._error = error

    @property
    def state_dict_metadata(self) -> Any:  # type: ignore[override]
        raise self._error


def _as_stock_wants(value: object) -> io.BytesIO:
    """Return what stock load planners take: a pickle, made here and never stored."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer
