"""What is there of a run, step by step: committed, damaged, unfinished; and what no policy takes.

One request for the manifest of a step and one listing beside it: thousands of them are looked at in
a second, on a disk as on S3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    NotFound,
    StorageError,
)
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import EPOCH_NOTE, PIN, file_key
from dist_ckpt.repository import marks
from dist_ckpt.repository.checkpoint import read_manifest
from dist_ckpt.repository.history import Record
from dist_ckpt.storage.base import Store

State: TypeAlias = Literal["committed", "damaged", "newer format", "unreadable", "unfinished"]
"""What is known of a step: `unfinished` has files and no manifest, as one that is being saved has,
and what a killed job left."""

_BAD: tuple[State, ...] = ("damaged", "newer format", "unreadable")


@dataclass(frozen=True, slots=True)
class Listed:
    """One step of a run, as its manifest describes it.

    Attributes:
        step: the training step.
        state: whether it is a checkpoint.
        marks: of `latest`, `pinned` those that it has; and of how many hosts this is the folder of
            one, where each has a folder of its own.
        problem: why it is none, "" where it is.
        manifest: what was committed, None where that cannot be read.
        record: what policies decide by, None where there is no manifest.
    """

    step: int
    state: State
    marks: tuple[str, ...] = ()
    problem: str = ""
    manifest: Manifest | None = None
    record: Record | None = None

    @property
    def nbytes(self) -> int | None:
        """How many bytes its files hold, None where that is not known."""
        return None if self.manifest is None else self.manifest.nbytes

    @property
    def created(self) -> datetime | None:
        """When it was committed, by the clock of the host of rank 0."""
        return None if self.record is None else self.record.created

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers by name, those noted after the save included."""
        return {} if self.record is None else self.record.metrics


def look(store: Store, step: int) -> Listed:
    """Return what is there of `step`.

    Raises:
        StorageError: the backend failed, other than by refusing this user.
    """
    try:
        return _described(store, manifest_format.decode(read_manifest(store, step), step=step))
    except NotFound:
        problem = "no manifest: it is being saved, or was cut off"
        return Listed(step, "unfinished", problem=problem)
    except StorageError as error:
        if error.kind is not ErrorKind.PERMISSION:
            raise
        return Listed(step, "unreadable", problem=error.message)
    except IncompatibleError as error:
        return Listed(step, "newer format", problem=error.message)
    except CheckpointError as error:
        return Listed(step, "damaged", problem=error.message)


def _described(store: Store, manifest: Manifest) -> Listed:
    step, save_id = manifest.step, manifest.save_id
    # One listing for all marks: asking a shared folder for a file that it lacks takes several looks
    # each time, as another host may just have put it there.
    names = store.list_children(file_key(step, save_id, PIN).removesuffix(PIN))
    note = marks.read_epoch_note(store, step, save_id) if EPOCH_NOTE in names else None
    pinned = ("pinned",) * (PIN in names)
    hosts = len(set(manifest.hosts.values()))
    spread = (f"1 of {hosts} hosts",) * (hosts > 1)
    return Listed(
        step,
        "committed",
        marks=pinned + spread,
        manifest=manifest,
        record=Record.of(manifest, note),
    )


def protected(listed: Sequence[Listed]) -> dict[int, str]:
    """Return, by step, why a checkpoint is not deleted whatever a policy says.

    Args:
        listed: every step of the run, ascending.
    """
    found: dict[int, str] = {each.step: each.state for each in listed if each.state in _BAD}
    found |= {each.step: "pinned" for each in listed if "pinned" in each.marks}
    good = [each for each in listed if each.manifest is not None]
    if good and (newest := good[-1]).manifest is not None:
        parent = newest.manifest.parent_step
        if parent is not None:
            # By this a job tells which one it restored: it may go back to it.
            found.setdefault(parent, "the one that the run went on from")
        found[newest.step] = "the newest"
    return found
