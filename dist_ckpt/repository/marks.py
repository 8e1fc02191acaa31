"""Small objects beside the files of a committed checkpoint: pins, and what came after the commit.

They lie in the directory of the save id, so they are of that very checkpoint, and go with it
(commit-v1, section 7).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import AlreadyExists, ErrorKind, IntegrityError, NotFound
from dist_ckpt.format.manifest import read_metrics, write_metrics
from dist_ckpt.format.names import EPOCH_NOTE, PIN, REMOVED, file_key
from dist_ckpt.storage.base import Store, read_all

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
    return _is_there(store, file_key(step, save_id, PIN))


def mark_removed(store: Store, step: int, save_id: str) -> None:
    """Say that a checkpoint is being deleted: what is left of it, should that be cut off, may go.

    An attempt of the claim that owns the run is otherwise taken for one that is being written.
    """
    _put_once(store, file_key(step, save_id, REMOVED))


def is_marked_removed(store: Store, step: int, save_id: str) -> bool:
    """Tell whether `mark_removed` was called for a checkpoint, of which the mark is still there."""
    return _is_there(store, file_key(step, save_id, REMOVED))


def _is_there(store: Store, key: str) -> bool:
    # Not by a listing: tens of thousands of files lie beside it.
    try:
        store.size(key)
    except NotFound:
        return False
    return True


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
