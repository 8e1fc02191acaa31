"""What a run says of its checkpoints: marks beside their files, and manifests, read once each.

The marks lie in the directory of the save id, so they are of that very checkpoint, and go with it
(commit-v1, section 7).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
)
from dist_ckpt.events import tell_once
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest, read_metrics, write_metrics
from dist_ckpt.format.names import EPOCH_NOTE, PIN, REMOVED, file_key, parse_save_id
from dist_ckpt.repository.checkpoint import read_manifest
from dist_ckpt.repository.source import reason
from dist_ckpt.storage.base import Store, has, read_all
from dist_ckpt.threads import map_in_parallel, threads_for

_MOST_SECONDS = 1e12


@dataclass(frozen=True, slots=True)
class Record:
    """What is decided by: one checkpoint, as its manifest describes it.

    Attributes:
        step: the training step.
        created: when it was committed, by the clock of the host of rank 0.
        epoch: the epoch that ended with this step, None in the middle of one.
        metrics: numbers by name, those that became known right after the save included.
        elapsed_seconds: how long the run had trained by then, over all its starts; None when it
            is not known.
        started: when the run first started, as text; None when it is not known.
        save_id: the attempt that wrote it.
    """

    step: int
    created: datetime
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    elapsed_seconds: float | None = None
    started: str | None = None
    save_id: str = ""

    @classmethod
    def of(cls, manifest: Manifest, note: EpochNote | None = None) -> Record:
        """Return what `manifest`, and the note written after it, say."""
        # Read with care: `origin` is any JSON.
        elapsed, started = (manifest.origin.get(name) for name in ("elapsed_seconds", "started"))
        return cls(
            step=manifest.step,
            created=datetime.fromisoformat(manifest.created),
            epoch=manifest.epoch if note is None or note.epoch is None else note.epoch,
            metrics=manifest.metrics | ({} if note is None else note.metrics),
            elapsed_seconds=_seconds(elapsed),
            started=started if isinstance(started, str) else None,
            save_id=manifest.save_id,
        )


def _seconds(value: object) -> float | None:
    """Return a time that a run can have trained, None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Compared before it is converted: an integer of JSON may be larger than any float.
    return float(value) if 0 <= value <= _MOST_SECONDS else None


class History:
    """The records of one run. Manifests never change, so each is read once.

    Not safe to use from several threads.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, Record | None] = {}

    def read(self, steps: Iterable[int]) -> list[Record]:
        """Return the records of those of `steps` that can be read, ascending.

        One that was deleted meanwhile, by hand for instance, or whose manifest is damaged or of
        another format, has none.

        Raises:
            StorageError: the backend failed; an outage never looks like a missing checkpoint.
        """
        ordered = sorted(steps)
        # What is gone may come back under the same number, as another checkpoint.
        known = {step: self._known[step] for step in ordered if step in self._known}
        new = [step for step in ordered if step not in known]
        read = map_in_parallel(self._found, new, threads=threads_for(len(new)))
        # One that is not there is asked for again, should it be listed again.
        known |= {step: found[0] for step, found in zip(new, read, strict=True) if found}
        self._known = known
        records = (known.get(step) for step in ordered)
        return [record for record in records if record is not None]

    def knows(self, step: int) -> bool:
        """Tell whether `step` was read before, and need not be read again."""
        return step in self._known

    def of(self, step: int) -> Record | None:
        """Return the record of `step`, None where `read` would leave it out.

        Raises:
            StorageError: the backend failed.
        """
        if step not in self._known:
            found = self._found(step)
            if not found:
                return None  # asked for again, should it be listed again
            self._known[step] = found[0]
        return self._known[step]

    def forget(self, step: int) -> None:
        """Read `step` anew next time: it was saved again, or noted something about."""
        self._known.pop(step, None)

    def _found(self, step: int) -> tuple[Record | None, ...]:
        try:
            return (self._read(step),)
        except NotFound:
            return ()

    def _read(self, step: int) -> Record | None:
        try:
            data = read_manifest(self._store, step)
            manifest = manifest_format.decode(data, step=step)
            note = read_epoch_note(self._store, step, manifest.save_id)
        except (IntegrityError, IncompatibleError, StorageError) as error:
            if isinstance(error, StorageError) and error.kind is not ErrorKind.PERMISSION:
                raise
            # Without a record nothing is decided about it: it stays, and keeps no other from it.
            # By a note that is lost it may have been the best.
            tell_once(
                self._store.url,
                f"step {step} in {self._store.url} counts for no policy: "
                f"{reason(step, self._store.url, error.message)}",
            )
            return None
        return Record.of(manifest, note)


# Of checkpoints in folders of several hosts, each of which may know of others.


@decodable
class StepMetrics(msgspec.Struct, frozen=True):
    """What one host knows of how good a checkpoint is.

    Attributes:
        claim: under which it was committed.
        step: which one.
        metrics: numbers by name.
    """

    claim: int
    step: int
    metrics: dict[str, float]


def list_metrics(records: Iterable[Record], *, besides: Collection[int] = ()) -> list[StepMetrics]:
    """Return what the records of a host say of its checkpoints, without the steps `besides`."""
    return [
        StepMetrics(parse_save_id(each.save_id) or 0, each.step, dict(each.metrics))
        for each in records
        if each.step not in besides
    ]


def join_metrics(found: Iterable[Sequence[StepMetrics]]) -> list[StepMetrics]:
    """Return what all hosts say together, ascending; of one step that of the latest claim."""
    known: dict[int, StepMetrics] = {}
    for each in (each for host in found for each in host):
        there = known.get(each.step)
        if there is None or there.claim < each.claim:
            known[each.step] = each
        elif there.claim == each.claim:
            # Some became known after the save, on some of the hosts.
            known[each.step] = StepMetrics(each.claim, each.step, there.metrics | each.metrics)
    return [known[step] for step in sorted(known)]


# Small objects beside the files of a committed checkpoint: pins, and what came after the commit.


_LIMIT_BYTES = 1 << 20


@decodable
class EpochNote(msgspec.Struct, frozen=True):
    """What was known of a checkpoint only after it was saved: the epoch it ended, and metrics."""

    epoch: int | None
    metrics: dict[str, float]


def pin(store: Store, step: int, save_id: str, reason: str) -> None:
    """Pin a checkpoint; one that is pinned stays as it is."""
    _put_once(store, file_key(step, save_id, PIN), reason=reason)


def unpin(store: Store, step: int, save_id: str) -> None:
    """Take the pin of a checkpoint away, if it has one."""
    store.delete([file_key(step, save_id, PIN)])


def is_pinned(store: Store, step: int, save_id: str) -> bool:
    """Tell whether a checkpoint is pinned. What the pin says does not matter, its being there does.

    Raises:
        StorageError: the backend failed; an outage never looks like a missing pin.
    """
    return has(store, file_key(step, save_id, PIN))


def mark_removed(store: Store, step: int, save_id: str) -> None:
    """Say that a checkpoint is being deleted: what is left of it, should that be cut off, may go.

    An attempt of the claim that owns the run is otherwise taken for one that is being written.
    """
    _put_once(store, file_key(step, save_id, REMOVED))


def is_marked_removed(store: Store, step: int, save_id: str) -> bool:
    """Tell whether `mark_removed` was called for a checkpoint, of which the mark is still there."""
    return has(store, file_key(step, save_id, REMOVED))


def _put_once(store: Store, key: str, **said: str) -> None:
    """Put a mark of which only its being there counts; what it holds is for people."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"created": created, "host": socket.gethostname(), **said}
    with suppress(AlreadyExists):
        store.put(key, [json.dumps(record, indent=2).encode()])


def put_epoch_note(store: Store, step: int, save_id: str, note: EpochNote) -> None:
    """Say of a committed checkpoint what became known after it was saved.

    Raises:
        AlreadyExists: that was said before.
    """
    fields: dict[str, Any] = {"epoch": note.epoch, "metrics": write_metrics(note.metrics)}
    store.put(file_key(step, save_id, EPOCH_NOTE), [json.dumps(fields, indent=2).encode()])


def read_epoch_note(store: Store, step: int, save_id: str) -> EpochNote | None:
    """Return what was said of a checkpoint after it was saved, None when nothing was.

    Raises:
        IntegrityError: it cannot be read.
    """
    key = file_key(step, save_id, EPOCH_NOTE)
    try:
        data = read_all(store, key, limit_bytes=_LIMIT_BYTES)
    except NotFound:
        return None
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
        metrics: Mapping[str, float] = read_metrics(fields.get("metrics"))
        return msgspec.convert({**fields, "metrics": metrics}, EpochNote)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            f"{key} in {store.url} is damaged ({error}): the epoch and the metrics that were noted "
            "there are not known any more; the checkpoint itself is not touched by that",
            kind=ErrorKind.MALFORMED,
        ) from error
