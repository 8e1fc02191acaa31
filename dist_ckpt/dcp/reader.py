"""A storage reader for torch.distributed.checkpoint: verified byte ranges under the stock load.

What is several tensors behind one face is filled by those that it is made of (`_face_targets`).
"""

from __future__ import annotations

import io
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dist_ckpt.dcp.catalog import Catalog, catalog, stock_catalog
from dist_ckpt.dcp.edge import (
    CheckpointId,
    names_step,
    open_store,
    plain_errors,
    step_of,
)
from dist_ckpt.dcp.faces import laid_out
from dist_ckpt.dcp.planners import is_unchanged, put_as_stock
from dist_ckpt.dcp.turns import wait_for_all
from dist_ckpt.errors import CheckpointError, ErrorKind, IncompatibleError, NotFound, UsageError
from dist_ckpt.foreign.dcp_files import is_stock
from dist_ckpt.format.index import Held
from dist_ckpt.format.names import check_step
from dist_ckpt.loading.fetching import MAX_GAP_BYTES, Fetcher
from dist_ckpt.loading.filling import Files, ReadTargets, Wanted, boxes_of
from dist_ckpt.loading.fitting import can_cast
from dist_ckpt.loading.opened import find_detached, find_foreign, locate
from dist_ckpt.loading.ties import Ties
from dist_ckpt.options import TIE_RULES, TieRule
from dist_ckpt.planning.describe import LocalBox, local_boxes
from dist_ckpt.planning.placing import check_as_stock
from dist_ckpt.repository import Repository
from dist_ckpt.repository.checkpoint import unless_deleted
from dist_ckpt.state.layout import (
    dtype_name,
    dtype_of,
    is_wrapped,
    label_of,
    local_of,
    stored_shape,
)
from dist_ckpt.state.rebuilding import difference, how_made
from dist_ckpt.state.spread import pieces
from dist_ckpt.storage.resolve import Place

IN_FLIGHT_BYTES = 64 << 20
"""How many bytes are under way at once, at most."""


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
    stock would convert it without a word; see `cast`. A load waits for the saves in flight.

    Checkpoints of `dist_ckpt.save` and of `Checkpointer` can be read too: their parts are the keys
    of the state dict. What they keep for each rank (random number generators) is left out. And so
    can the directory of a stock checkpoint, which has no digests; nothing of it is executed either.
    """

    def __init__(
        self,
        url: Place,
        *,
        step: int | None = None,
        ties: TieRule = "refuse",
        cast: bool = False,
    ) -> None:
        """Describe the checkpoint; nothing is read yet.

        Args:
            url: the run: a path, a URL, or a `Store`; the same on every rank. Or the directory of
                one step, or of a stock checkpoint.
            step: which checkpoint, None for the newest. Another one is never taken for it.
            ties: where entries of the state dict share memory and the checkpoint has different
                values for them: "refuse" is an error that names both, before anything is changed;
                "last" lets the last entry have its way, as stock does. A planner with a
                `resolve_tensor` of its own is always asked as stock asks it, entry by entry.
            cast: let floating tensors take another floating dtype, and integers a wider one, as
                `dist_ckpt.load(cast=True)` does.

        Raises:
            UsageError: the place, the step, `ties` or `cast` is malformed.
        """
        if ties not in TIE_RULES:
            raise UsageError(f"ties is one of {', '.join(TIE_RULES)}, not {ties!r}")
        if not isinstance(cast, bool):
            raise UsageError(f"cast is True or False, not {cast!r}")
        self._ties: TieRule = ties
        self._cast = cast
        self._step = None if step is None else check_step(step)
        self._place = url
        self._store = open_store(url)
        self._catalog: Catalog | None = None
        self._failure: CheckpointError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # To another process: what is asked for, and nothing of what is open.
        return {**self.__dict__, "_catalog": None, "_failure": None}

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Forget what was read; choose the step, if `checkpoint_id` names one.

        Raises:
            UsageError: it is a path that leads out of the run, or anything else that is no step.
        """
        self._catalog = self._failure = None
        if checkpoint_id is not None:
            step = step_of(checkpoint_id, self._store)
            # The run itself names no step: that of the Reader is meant.
            self._step = self._step if step is None else step

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Tell whether `checkpoint_id` names a step."""
        return names_step(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Open the checkpoint; see `StorageReader.read_metadata`.

        A failure is raised when the load goes on, or when the metadata are looked at: stock takes
        any exception here for a checkpoint of one rank alone, and gives up the coordination by
        which the other ranks would hear of it.
        """
        self._catalog = self._failure = None
        # Over one process group a save in flight might be sent what is meant for this load.
        wait_for_all()
        try:
            with plain_errors():
                self._catalog = self._open()
                metadata = self._catalog.metadata()
                if metadata.storage_meta is not None:
                    # As the reader of torch does (`filesystem.py`).
                    metadata.storage_meta.load_id = str(uuid.uuid4())
                return metadata
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
            # What is raised here all ranks hear of; what `read_metadata` raises stock keeps.
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which checkpoint this rank reads; see `StorageReader.prepare_local_plan`."""
        source = self._opened.source
        return replace(plan, storage_data=_Opened(source.where, source.save_id))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Rank 0: see that all ranks read one checkpoint; see `StorageReader.prepare_global_plan`.

        Raises:
            UsageError: they do not.
        """
        # Each rank looked for the newest by itself, and a save may have ended between two looks.
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
            IncompatibleError: a tensor has another dtype than the stored one; nothing was changed,
                unless the planner resolves tensors in a way of its own.
            IntegrityError: stored bytes differ from their digest.
            NotFound: the checkpoint was deleted since it was opened.
        """
        with plain_errors(), unless_deleted(self._opened.source):
            live = getattr(planner, "state_dict", {})
            # All of them before the first byte is read: a refusal leaves the state as it was.
            for fqn in {item.dest_index.fqn for item in plan.items}:
                check_as_stock(live.get(fqn), f"tensor {fqn!r}")
            # Such a planner gives out the live tensors, and all of them can be read at once.
            if is_unchanged(planner, "resolve_tensor", "transform_tensor", "lookup_tensor"):
                self._read_at_once(plan, planner)
            else:
                self._read_in_turn(plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def _opened(self) -> Catalog:
        if self._catalog is None:
            raise UsageError("no checkpoint is open: torch.distributed.checkpoint.load opens it")
        return self._catalog

    def _open(self) -> Catalog:
        location = locate(self._place, self._step)
        if location.file is not None:
            return catalog(find_foreign(location))
        if location.step is not None and find_detached(location) is None:
            return catalog(Repository(location.store).open(location.step))
        try:
            # Whatever else lies in a run, its checkpoints come first.
            return catalog(Repository(location.store).open_latest())
        except NotFound:
            detached = find_detached(location)
        if detached is not None:
            return catalog(Repository(detached.store).open_latest())
        if is_stock(location.store):
            return stock_catalog(location.store)
        return catalog(find_foreign(location))

    def _read_at_once(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Read for a planner whose tensors are those of the state dict."""
        wanted = [item for item in plan.items if _is_tensor(item)]
        faces = {id(item): _live_face(self._opened, item, planner) for item in wanted}
        # Of all items first: what does not fit is refused while nothing has changed.
        targets: dict[int, list[Wanted]] = {}
        for item in wanted:
            live = faces[id(item)]
            if live is not None:
                targets[id(item)] = _face_targets(self._opened, item, live)
            else:
                targets[id(item)] = [self._target(item, planner.resolve_tensor(item))]
        self._fill([each for found in targets.values() for each in found])
        for item in plan.items:
            if _is_tensor(item):
                live = faces[id(item)]
                memory = targets[id(item)][0].local.memory if live is None else local_of(live)
                planner.commit_tensor(item, memory)
            else:
                self._hand_over(item, planner)

    def _read_in_turn(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Read for a planner that may make each tensor up: one at a time, as stock asks for them.

        What it gives for an item is committed before the next one is asked for. So the stored
        bytes come to memory of ours first, a window of them at a time.
        """
        for window in _windows(plan.items, self._nbytes):
            staged = {
                id(item): self._staged(item)
                for item in window
                if _is_tensor(item) and _live_face(self._opened, item, planner) is None
            }
            self._fill([*staged.values()])
            for item in window:
                if not _is_tensor(item):
                    self._hand_over(item, planner)
                    continue
                live = _live_face(self._opened, item, planner)
                if live is not None:
                    given = planner.resolve_tensor(item)
                    self._fill(_face_targets(self._opened, item, live, given))
                    planner.commit_tensor(item, given)
                    continue
                target = self._target(item, planner.resolve_tensor(item)).local.memory
                # Let go of at once: more than a window of it is never held.
                target.copy_(staged.pop(id(item)).local.memory)
                planner.commit_tensor(item, target)

    def _hand_over(self, item: ReadItem, planner: LoadPlanner) -> None:
        value = self._opened.values[item.storage_index.fqn]()
        if not put_as_stock(planner, item, value):
            planner.load_bytes(item, _as_stock_wants(value))

    def _nbytes(self, item: ReadItem) -> int:
        number = self._opened.tensors.get(item.storage_index.fqn)
        if number is None:
            return 0
        dtype = dtype_of(self._opened.source.tensors[number].dtype)
        return math.prod(item.lengths) * dtype.itemsize

    def _staged(self, item: ReadItem) -> Wanted:
        """Return memory of our own for what `item` wants."""
        number = self._opened.tensors[item.storage_index.fqn]
        dtype = dtype_of(self._opened.source.tensors[number].dtype)
        # Of the stored dtype: a cast is made where it is copied to what the planner gives.
        return self._target(item, torch.empty(tuple(item.lengths), dtype=dtype))

    def _target(self, item: ReadItem, tensor: torch.Tensor) -> Wanted:
        fqn = item.storage_index.fqn
        number = self._opened.tensors[fqn]
        source = self._opened.source
        stored = source.tensors[number]
        dtype = dtype_of(stored.dtype)
        # Autograd lets nobody write into a leaf that wants gradients; this shares its memory.
        memory = tensor.detach()
        fits = memory.dtype == dtype or (self._cast and can_cast(dtype, memory.dtype))
        if not fits or memory.device.type == "meta":
            way = "give a tensor of the stored dtype, with memory"
            if not fits and can_cast(dtype, memory.dtype):
                way += ", or Reader(..., cast=True)"
            raise IncompatibleError(
                f"{fqn!r} is {stored.dtype} in {source.where}, and the state dict has "
                f"{dtype_name(memory.dtype)} on {memory.device}: {way}; it was not changed"
            )
        sizes = tuple(item.lengths)
        if tuple(memory.shape) != sizes:
            raise IncompatibleError(
                f"the planner gave {list(memory.shape)} for {fqn!r}, and asked for {list(sizes)}: "
                "resolve_tensor returns what the item names; it was not changed"
            )
        # torch counts the offsets of an item from the start of its stored chunk, not of the tensor.
        chunk = item.storage_index.offset or torch.Size([0] * len(stored.shape))
        offsets = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
        box = Held(stored.part, stored.name, stored.dtype, stored.shape, offsets, sizes)
        return Wanted(number, LocalBox(box, memory), dtype)

    def _fill(self, wanted: Sequence[Wanted]) -> None:
        source = self._opened.source
        ties = Ties(
            source.index_of(boxes_of(wanted)),
            wanted,
            where=source.where,
            rule=self._ties,
            window_bytes=IN_FLIGHT_BYTES,
        )
        # What shares memory is compared beside it first: nothing live changes before it agrees.
        for number in range(ties.windows):
            self._fetch(ties.window(number))
            ties.settle(number)
        self._fetch(ties.wanted)
        ties.finish()

    def _fetch(self, wanted: Sequence[Wanted]) -> None:
        source = self._opened.source
        index = source.index_of(boxes_of(wanted))
        # Of these boxes alone: segments about others need not be read.
        files = Files.of(index, apart_bytes=MAX_GAP_BYTES, verify=source.verified)
        filling = ReadTargets(index, wanted, files, max_gap_bytes=MAX_GAP_BYTES)
        Fetcher(
            source, files, filling, verify=source.verified, in_flight_bytes=IN_FLIGHT_BYTES
        ).fetch_all()


def _is_tensor(item: ReadItem) -> bool:
    return item.type == LoadItemType.TENSOR


def _windows(
    items: Sequence[ReadItem], nbytes_of: Callable[[ReadItem], int]
) -> Iterator[list[ReadItem]]:
    """Yield the items in their order, as many at a time as fit into the memory in flight."""
    window: list[ReadItem] = []
    taken = 0
    for item in items:
        nbytes = nbytes_of(item)
        # An item that is larger by itself makes a window of its own: the planner takes it whole.
        if window and taken + nbytes > IN_FLIGHT_BYTES:
            yield window
            window, taken = [], 0
        window.append(item)
        taken += nbytes
    if window:
        yield window


_FIELDS = frozenset(each.name for each in fields(Metadata))


class _Unreadable(Metadata):
    """Metadata of a checkpoint that could not be opened: to look at them is the error."""

    def __init__(self, error: CheckpointError) -> None:
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        if name in _FIELDS:
            raise object.__getattribute__(self, "_error")
        return object.__getattribute__(self, name)


def _as_stock_wants(value: object) -> io.BytesIO:
    """Return what stock load planners take: a pickle, made here and never stored."""
    buffer = io.BytesIO()
    # Not as a zip archive: for a number that takes twice as long to write and to read.
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    return buffer


# Where stored tensors go in what is several of them behind one face, under torch's own loads.


def _live_face(found: Catalog, item: ReadItem, planner: LoadPlanner) -> torch.Tensor | None:
    """Return the live tensor for `item` if that is several behind one face, live or as stored.

    Not so where a plain tensor takes what is one of them, and whole by itself.
    """
    live, fqn = getattr(planner, "state_dict", {}).get(item.dest_index.fqn), item.storage_index.fqn
    several = is_wrapped(live) or (fqn in found.faces and fqn not in found.tensors)
    return live if several and isinstance(live, torch.Tensor) else None


def _face_targets(
    found: Catalog, item: ReadItem, live: torch.Tensor, given: torch.Tensor | None = None
) -> list[Wanted]:
    """Return where the tensors go that are stored for `item`.

    Args:
        found: what is stored.
        item: what is wanted.
        live: the tensor of the state dict.
        given: what a planner wants filled instead of what is on this rank of `live`.

    Raises:
        IncompatibleError: they do not fit; nothing was changed.
    """
    fqn, stored = item.storage_index.fqn, found.source.tensors
    if not is_wrapped(live):
        _refuse(found, fqn, live, "give a tensor of that class: none is converted")
    here = local_of(live)
    value = here if given is None else given
    # Rows of the whole are no rows of what it is made of.
    if tuple(item.lengths) != tuple(here.shape) or tuple(value.shape) != tuple(here.shape):
        _refuse(found, fqn, live, f"only all {list(here.shape)} of this rank can be read at once")
    if not is_wrapped(value):
        _refuse(found, fqn, live, "resolve_tensor of the planner has to return one, too")
    whole = laid_out(value, live)
    if fqn in found.faces:
        problem = difference(how_made(whole), found.faces[fqn])
        if problem is not None:
            _refuse(found, fqn, live, f"stored and in the state dict are {problem}")
    wanted: list[Wanted] = []
    for suffix, tensor in pieces(whole, fqn).items():
        number = found.tensors.get(fqn + suffix)
        if number is None:
            _refuse(found, fqn, live, f"no {fqn + suffix!r} is stored")
        # All is compared before a byte is read, so that what does not fit leaves the state as it
        # was.
        entry = stored[number]
        kept, has = (entry.dtype, entry.shape), (dtype_name(tensor.dtype), stored_shape(tensor))
        if kept != has:
            was, now = (f"{dtype}{list(shape)}" for dtype, shape in (kept, has))
            _refuse(found, fqn, live, f"{fqn + suffix!r} is stored as {was}, and is {now} here")
        # Cut as the live one is: of each inner tensor a rank reads what it holds.
        boxes = local_boxes({entry.part: {entry.name: tensor}})
        wanted += [Wanted(number, box, dtype_of(entry.dtype)) for box in boxes]
    return wanted


def _refuse(found: Catalog, fqn: str, live: torch.Tensor, why: str) -> NoReturn:
    noted = found.faces.get(fqn)
    stored = "a plain tensor" if fqn in found.tensors else "no tensor by itself"
    if noted is not None:
        stored = f"a {noted.get('class')}, which is several tensors in one"
    kind = label_of(type(local_of(live)))
    raise IncompatibleError(
        f"{fqn!r} is {stored} in {found.source.where}, and the state dict has a {kind}: {why}; it "
        "was not changed",
        kind=ErrorKind.STATE_MISMATCH,
    )
