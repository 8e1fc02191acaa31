"""Tensors on their way into a run: in memory if they are small, else in a file without a name.

A save takes live tensors. Those of another checkpoint are laid out in a mapping first, which the
kernel can write back to the disk when memory gets scarce.
"""

from __future__ import annotations

import errno
import math
import mmap
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dist_ckpt.doors.content import Item, Outgoing, rounded_up
from dist_ckpt.doors.image import WINDOW_BYTES, Image, boxes_of_range, windows
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    NotFound,
    StorageError,
    UsageError,
    describe,
)
from dist_ckpt.functional import save
from dist_ckpt.loading.opened import BoxTarget, OpenedCheckpoint, open_checkpoint, place_name
from dist_ckpt.repository.destination import check_new_run
from dist_ckpt.repository.tally import Tally
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.base import Stream
from dist_ckpt.storage.resolve import Place, resolved

IN_MEMORY_BYTES = 256 << 20
"""How much is kept in memory, at most; more goes through a file."""

# The copies of the save come on top of what was read, so there are few at a time.
_SAVE_BYTES = 128 << 20
BATCH_BYTES = 4 * WINDOW_BYTES
"""How much is read at once, about."""


class SpooledPart:
    """A part of a state that is what was read of another checkpoint, to be saved once.

    Args:
        content: its tensors; None if there are none.
        objects: its encoded Python values.
        tally: told of the tensors as they are read.

    Raises:
        StorageError: there is no room for them in the folder for temporary files.
        CheckpointError: they cannot be read.
    """

    def __init__(
        self, content: Outgoing | None, objects: Mapping[str, bytes], tally: Tally
    ) -> None:
        # Encoded as they are: no type of another program need be known here.
        self._objects = dict(objects)
        self._tensors = {} if content is None else _read(content, tally)

    def capture(self) -> Captured:
        """Return the tensors and values."""
        return Captured(dict(self._tensors), dict(self._objects))

    def targets(self, stored: Stored) -> Targets:
        """Want nothing: it is saved and never loaded into."""
        return Targets()

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take nothing."""


def save_parts(
    contents: Mapping[str, Outgoing | None],
    objects: Mapping[str, Mapping[str, bytes]],
    url: Place,
    *,
    step: int,
    metrics: Mapping[str, float],
    metadata: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Save parts as the checkpoint `step` of the run at `url`, by this process alone.

    Args:
        contents: by part its tensors; None for a part without any.
        objects: by part its encoded values; those of a part that is not there are none.
        url: the run.
        step: which checkpoint it becomes.
        metrics: stored with it.
        metadata: stored with it.
        storage_options: for the backend of the run.

    Raises:
        StorageError: the run, or the folder for temporary files, is full or failed.
        CheckpointError: nothing was committed.
    """
    nbytes = sum(_nbytes(content) for content in contents.values() if content is not None)
    tally = Tally(place_name(url, storage_options), "reading", nbytes)
    named: dict[str, object] = {
        part: SpooledPart(content, objects.get(part, {}), tally)
        for part, content in contents.items()
    }
    try:
        with resolved(url, storage_options=storage_options) as store:
            save(
                TrainState(rng=None, **named),  # type: ignore[arg-type]
                store,
                step=step,
                metrics=metrics,
                metadata=metadata,
                # Also under a launcher, as in a job with several ranks: no other is in this call.
                ranks="alone",
                memory_limit_bytes=_SAVE_BYTES,
                command=False,
            )
    except UsageError as error:
        if error.kind is not ErrorKind.STEP_BEHIND:
            raise
        # Not that one could go on from the newest, as a training does.
        raise UsageError(
            f"a newer checkpoint than step {step} is in {place_name(url, storage_options)}, and a "
            "restart would go on from that one: bring in the older one first, or into another run",
            kind=error.kind,
        ) from error


def check_target(url: Place, storage_options: Mapping[str, Any] | None) -> None:
    """Check that a run may be at `url`, before what goes there is read. See `check_new_run`."""
    with resolved(url, storage_options=storage_options) as store:
        check_new_run(store, storage_options)


def is_saved(
    contents: Mapping[str, Outgoing | None],
    objects: Mapping[str, Mapping[str, bytes]],
    url: Place,
    step: int,
    *,
    stored: Callable[[OpenedCheckpoint, str], Outgoing],
    metrics: Mapping[str, float] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> bool:
    """Tell whether a checkpoint is committed already, as after a call that was cut off.

    Args:
        contents: by part its tensors; None for a part without any.
        objects: by part its encoded values; where there is none they are not compared.
        url: the run.
        step: which checkpoint.
        stored: how the tensors of a part of an opened checkpoint are called and read.
        metrics: what is stored with it; None where they are not compared.
        storage_options: for the backend of the run.

    Raises:
        AlreadyExists: the step is something else.
    """
    try:
        there = open_checkpoint(url, step=step, storage_options=storage_options)
    # An outage is no NotFound: it is raised, as nobody knows what is there.
    except NotFound:
        return False
    where = place_name(url, storage_options)
    with there:
        known = {} if there.manifest is None else there.manifest.metrics
        alike = metrics is None or _as_text(metrics) == _as_text(known)
        # The cheap ones first: both sides are read through only if names and values agree.
        if (
            not alike
            or set(there.parts) != set(contents)
            or not all(
                (part not in objects or there.read_encoded(part) == objects[part])
                and (content is None or _is_same(content, stored(there, part), where))
                for part, content in contents.items()
            )
        ):
            raise AlreadyExists(
                f"step {step} is committed in {where}, and is another checkpoint than "
                "this would be: give another step=, or another run",
                kind=ErrorKind.STEP_EXISTS,
            )
    return True


def _as_text(metrics: Mapping[str, float]) -> dict[str, str]:
    # In which NaN equals NaN.
    return {name: repr(float(value)) for name, value in metrics.items()}


def _is_same(one: Outgoing, other: Outgoing, where: str) -> bool:
    """Tell whether two contents have the same names, dtypes, shapes and bits; reads both."""
    if dict(one.items) != dict(other.items):
        return False
    # As one file each, by windows: neither tensor is ever in memory as a whole.
    image = Image()
    for item in one.items.values():
        image.skip_to(rounded_up(image.nbytes))
        image.add_tensor(item)
    ours, theirs = (Stream(image.nbytes, partial(windows, image, each)) for each in (one, other))
    tally = Tally(where, "comparing", image.nbytes)
    return all(map(operator.eq, tally.counted(0, ours), theirs))


def _read(content: Outgoing, tally: Tally) -> dict[str, torch.Tensor]:
    first, stored = _first_names(content), _stored_items(content)
    mapping = _mapping(sum(rounded_up(item.nbytes) for item in stored))
    found: dict[str, torch.Tensor] = {}
    at = 0
    for item in stored:
        found[item.name] = _tensor(mapping, item, at)
        at += rounded_up(item.nbytes)
    for number, batch in enumerate(_batches(stored, found)):
        content.fill(batch)
        tally.note((id(content), number), sum(memory.nbytes for _, _, memory in batch))
    # Names of one memory stay so: a save stores it once.
    return {name: found[first.get(name, name)] for name in content.items}


def _first_names(content: Outgoing) -> dict[str, str]:
    """Return for names that are one tensor which of them it is stored under."""
    return {name: group[0] for group in content.ties for name in group}


def _stored_items(content: Outgoing) -> list[Item]:
    first = _first_names(content)
    return [item for name, item in content.items.items() if first.get(name, name) == name]


def _nbytes(content: Outgoing) -> int:
    return sum(item.nbytes for item in _stored_items(content))


def _tensor(mapping: mmap.mmap, item: Item, offset: int) -> torch.Tensor:
    # `torch.frombuffer` refuses to take no elements.
    if not item.nbytes:
        return torch.empty(item.shape, dtype=item.dtype)
    count = math.prod(item.shape)
    flat = torch.frombuffer(mapping, dtype=item.dtype, count=count, offset=offset)
    return flat.view(item.shape)


def _batches(
    items: Sequence[Item], tensors: Mapping[str, torch.Tensor]
) -> Iterator[list[BoxTarget]]:
    """Yield what is read at once, not much more than `BATCH_BYTES` each."""
    batch: list[BoxTarget] = []
    nbytes = 0
    for item in items:
        count = math.prod(item.shape)
        flat = tensors[item.name].view(-1)
        # A tensor may be larger than memory: pages that are filled can be written back.
        step = BATCH_BYTES // item.dtype.itemsize
        for start in range(0, count, step):
            at = start
            for offsets, sizes in boxes_of_range(item.shape, start, min(start + step, count)):
                box = flat[at : at + math.prod(sizes)].view(sizes)
                at += box.numel()
                batch.append((item.name, offsets, box))
                nbytes += box.nbytes
            if nbytes >= BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch


def _mapping(nbytes: int) -> mmap.mmap:
    if nbytes <= IN_MEMORY_BYTES:
        # mmap refuses a length of 0.
        return mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not what Python takes in its place where that cannot be used: it was named for its room.
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Before anything is written: a mapping of a full disk ends the process.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            # The mapping outlives the file, which has no name: after a kill nothing is left.
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        # A quota is a full disk to whoever meets it.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "there is no room" if full else "there is no way"
        raise StorageError(
            f"{what} to put {nbytes} bytes into {folder}, the folder for temporary files: "
            f"{describe(error)}; name another one by TMPDIR",
            kind=ErrorKind.STORAGE_FULL if full else None,
        ) from error
