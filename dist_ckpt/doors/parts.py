"""Some parts of a checkpoint, as a checkpoint of another run: the model without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ckpt.doors.content import Item
from dist_ckpt.doors.spool import is_saved, save_parts
from dist_ckpt.errors import UsageError, near
from dist_ckpt.loading.opened import BoxTarget, OpenedCheckpoint, open_checkpoint
from dist_ckpt.repository.listed import look
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place


@dataclass(frozen=True, slots=True)
class PartsReport:
    """What was copied.

    Attributes:
        step: under which step it is committed, that of the source.
        parts: which parts.
        tensors: how many names there are.
        nbytes: of their elements.
        was_there: whether it had been committed before, bit for bit the same.
    """

    step: int
    parts: tuple[str, ...]
    tensors: int
    nbytes: int
    was_there: bool


def copy_parts(source: Store, url: Place, *, step: int, parts: Sequence[str]) -> PartsReport:
    """Commit some parts of a checkpoint to another run, as one that never had any others.

    It is a save of its own: by this process, with the step, the metrics and the metadata of the
    source, in which `copied_from` says where the rest is. The call takes the run over.

    Args:
        source: the run.
        url: the run to copy into.
        step: which checkpoint.
        parts: their names.

    Raises:
        NotFound: there is no such checkpoint.
        AlreadyExists: another checkpoint of this step is there.
        IntegrityError: the source is damaged; nothing was committed.
        UsageError: there is no such part, or each rank has its own values in it.
    """
    if not parts:
        raise UsageError("name the parts to copy, such as model")
    with open_checkpoint(source, step=step) as opened:
        # All are looked at before a byte is read: a refusal leaves nothing half done.
        for part in parts:
            _check_part(opened, part)
        contents = {part: _Content(opened, part) for part in parts}
        # Still encoded: what a value is made of need not be known here to be copied.
        objects = {part: opened.read_encoded(part) for part in parts}
        # Without metrics: those of the source may have come after the first copy.
        was_there = is_saved(contents, objects, url, step, stored=_Content)
        if not was_there:
            # As policies see it: with what became known after the save.
            found = look(source, step)
            metadata = _metadata(opened, None if found.record is None else found.record.epoch)
            save_parts(contents, objects, url, step=step, metrics=found.metrics, metadata=metadata)
        items = [item for content in contents.values() for item in content.items.values()]
        nbytes = sum(item.nbytes for item in items)
        return PartsReport(step, tuple(parts), len(items), nbytes, was_there)


class _Content:
    """The tensors of one part under the names that they have, to which its values may refer."""

    def __init__(self, opened: OpenedCheckpoint, part: str) -> None:
        self._opened = opened
        self._part = part
        infos = (info for info in opened.info.values() if info.part == part)
        self.items: Mapping[str, Item] = {
            info.name: Item(info.name, info.dtype, tuple(info.shape)) for info in infos
        }
        self.ties: Sequence[tuple[str, ...]] = opened.ties(part)

    def fill(self, boxes: Sequence[BoxTarget]) -> None:
        """Fill memory with boxes of the tensors. See `Outgoing.fill`."""
        self._opened.read_boxes((f"{self._part}/{name}", at, box) for name, at, box in boxes)


def _check_part(opened: OpenedCheckpoint, part: str) -> None:
    if part not in opened.parts:
        raise UsageError(
            f"{opened.where} has no part {part!r}{near(part, opened.parts)}; there are "
            f"{', '.join(opened.parts)}"
        )
    # What this process would commit is one rank's: the others would restore it as theirs.
    if opened.differs_by_rank(part):
        raise UsageError(
            f"each rank has values of its own in part {part!r} of {opened.where}, and the one "
            "process that copies cannot commit those of all: copy the whole checkpoint, or other "
            "parts"
        )


def _metadata(opened: OpenedCheckpoint, epoch: int | None) -> Mapping[str, Any]:
    manifest = opened.manifest
    said = {} if manifest is None else dict(manifest.metadata)
    origin = {"checkpoint": opened.where, "epoch": epoch, "parts": list(opened.parts)}
    # A copy of a copy names the first origin: that is where the other parts are.
    return {**said, "copied_from": said.get("copied_from", origin)}
