"""The checkpoints of a run: what it says of each, and the removal of those that are not wanted.

What is said are manifests, read once each, and marks beside their files. The marks lie in the
directory of the save id, so they are of that very checkpoint, and go with it (commit-v1, section
7). What is removed goes in an order that never leaves half a checkpoint listed, and only names that
dist_ckpt itself writes are ever deleted (section 6): anything else that somebody put into the run
stays where it is.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
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
    UsageError,
)
from dist_ckpt.events import tell_once
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest, read_metrics, write_metrics
from dist_ckpt.format.names import (
    EPOCH_NOTE,
    INDEX,
    PIN,
    REMOVED,
    attempt_dir,
    file_key,
    is_attempt_file,
    manifest_key,
    parse_save_id,
    parse_step_dir,
    step_dir,
)
from dist_ckpt.repository import status
from dist_ckpt.repository.commit import read_manifest
from dist_ckpt.repository.source import reason
from dist_ckpt.storage.base import Store, Sweeper, has, is_temporary, read_all
from dist_ckpt.threads import map_in_parallel, threads_for

# Thirty thousand years: who claims more says nothing of a training.
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

    def knows(self, note: EpochNote) -> bool:
        """Whether all that `note` says was said before."""
        said = (self.metrics.get(name, "") for name in note.metrics)
        # Not equal to itself is NaN, which is the same when it is told again.
        alike = (
            a == b or (a != a and b != b) for a, b in zip(said, note.metrics.values(), strict=True)
        )
        return note.epoch in (None, self.epoch) and all(alike)


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
        # None for one that cannot be read, which is known then and not tried again.
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
            # Nothing, so that it is asked for again; a None in its place would be remembered.
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
        # The later claim, whose job took the run over from the other one.
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
    # The first one stays, with its reason: a second says nothing new.
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


# Removing what is no longer wanted.


# Some at a time, so that what is found first goes before the rest of a long run was looked at.
_LOOKED_AT_ONCE = 128
# What a restart takes, and what it takes where that turns out to be damaged.
_ASKED_AGAIN = 2


def remembered(
    steps: Sequence[int],
    history: History,
    may_go: Callable[[Sequence[Record]], list[Record]],
    committed_of: Callable[[Sequence[int]], list[int]],
) -> list[Record]:
    """Return what may go, without asking for each checkpoint that was there before.

    Args:
        steps: those that have a directory.
        history: what was read already.
        may_go: decides, of those that are committed.
        committed_of: returns those of some steps that are committed, ascending.
    """
    before = {step for step in steps if history.knows(step)}
    while True:
        found = history.read(steps)
        gone = may_go(found)
        old = {each.step for each in gone} & before
        kept = before.intersection(each.step for each in found) - old
        # What somebody deleted by hand must keep no room, and is not deleted again. Asked of what
        # may go, and of those alone that a restart takes first; if one is gone, all are read anew.
        asked = sorted(old.union(sorted(kept)[-_ASKED_AGAIN:]))
        if not gone or committed_of(asked) == asked:
            return gone
        # Who deleted one may have deleted others.
        for step in before:
            history.forget(step)
        before = set()


def delete_checkpoint(store: Store, step: int) -> None:
    """Remove one checkpoint: from the first deletion on it does not exist.

    Raises:
        StorageError: a deletion failed; what remains is garbage for `collect_garbage`.
    """
    # By a call of its own, since what one call deletes may go in any order.
    store.delete([manifest_key(step)])
    for name in store.list_children(f"{step_dir(step)}/"):
        if name.endswith("/") and parse_save_id(name[:-1]) is not None:
            _delete_attempt(store, f"{step_dir(step)}/{name}")


def delete_attempt(store: Store, step: int, save_id: str) -> None:
    """Remove the files of one attempt that no manifest names any more."""
    _delete_attempt(store, attempt_dir(step, save_id))


def collect_garbage(
    store: Store,
    *,
    claim: int,
    in_flight: Collection[str],
    before: float | None = None,
    deleted: Collection[str] = (),
    refused: list[str] | None = None,
) -> list[str]:
    """Remove the files of attempts that can no longer commit; return their folders.

    An attempt is dead when its claim is not newer than `claim`, no manifest names it, and it is
    not in `in_flight`. A step that this user may not look into, or that lies behind a link, is
    left alone, and told.

    Args:
        store: where the run is.
        claim: the claim of the caller, which owns the run.
        in_flight: save_ids that the caller is writing now; looked at whenever that matters, so it
            may change meanwhile.
        before: only of folders in which nothing was put since, in seconds since 1970.
        deleted: folders of attempts whose checkpoints the caller deleted just now.
        refused: gets what this user has no right to; for None a warning tells it, once.

    Raises:
        StorageError: a listing or a deletion failed.
        UsageError: `before` was given, and the store does not say when an object was put.
    """
    # Asked once: what a folder held tells its age also after that is gone.
    is_old = cache(partial(_is_old, store, before=before))
    removed: list[str] = []
    for folder in garbage(store, claim=claim, in_flight=in_flight, refused=refused):
        with passing_by(store, folder, refused):
            if is_old(folder):
                _delete_attempt(store, folder)
                removed.append(folder)
    if before is None:
        with passing_by(store, "what jobs before said of themselves", refused):
            store.delete(status.old_keys(store, claim))
    if isinstance(store, Sweeper):
        # Unfinished objects of killed writers.
        def may_go(key: str) -> bool:
            folder, _, name = key.rpartition("/")
            mark = is_temporary(name) and _is_of_a_mark(store, folder, {*removed, *deleted})
            if not mark and not _may_go(key, claim=claim, in_flight=in_flight):
                return False
            return not name or is_old(f"{folder}/")

        with passing_by(store, "what killed writers left", refused):
            store.sweep(may_go=may_go)
    return removed


def garbage(
    store: Store,
    *,
    claim: int,
    in_flight: Collection[str],
    refused: list[str] | None = None,
) -> Iterator[str]:
    """Yield the folders of dead attempts, as they are found. See `collect_garbage`."""

    def dead(child: str) -> list[str]:
        found: list[str] = []
        with passing_by(store, child, refused):
            found += _dead_in(store, child, claim=claim, in_flight=in_flight)
        return found

    folders = (each for each in store.list_children() if each.endswith("/"))
    steps = [each for each in folders if parse_step_dir(each[:-1]) is not None]
    for first in range(0, len(steps), _LOOKED_AT_ONCE):
        some = steps[first : first + _LOOKED_AT_ONCE]
        for found in map_in_parallel(dead, some, threads=threads_for(len(some))):
            yield from found


def _is_old(store: Store, folder: str, *, before: float | None) -> bool:
    """Whether nothing was put into `folder` since; what holds nothing has no age, and stays."""
    if before is None:
        return True
    newest: float | None = None
    for entry in store.list_entries(folder):
        if entry.modified is None:
            raise UsageError(
                f"{store.url} does not say when an object was put there, so nothing is known to be "
                "older than that: sweep without an age"
            )
        # By the newest: what is still added to is not old.
        newest = max(newest or 0.0, entry.modified)
    return newest is not None and newest < before


@contextmanager
def passing_by(store: Store, what: str, refused: list[str] | None = None) -> Iterator[None]:
    """Leave `what` alone where this user has no right to it: tell so once, or note it in `refused`.

    Any other failure is an outage, and stays one.
    """
    try:
        yield
    except StorageError as error:
        if error.kind is not ErrorKind.PERMISSION:
            raise
        if refused is None:
            tell_once(store.url, f"{what} in {store.url} is left as it is: {error.message}")
        else:
            refused.append(f"{what}: {error.message}")


def _may_go(key: str, *, claim: int, in_flight: Collection[str]) -> bool:
    """Whether `key` is of an unfinished object of ours that nobody needs; see `MayGo`.

    Only the three places where dist_ckpt writes count: other folders of a run are other people's.
    """
    folder, _, name = key.rpartition("/")
    top, _, attempt = folder.partition("/")
    if folder == "claims" or (not attempt and parse_step_dir(top) is not None):
        # Claims and manifests are put whole: an upload under such a name is nobody's that died.
        return not name or is_temporary(name)
    if parse_step_dir(top) is None:
        return False
    owner = parse_save_id(attempt)
    if owner is None:
        return False
    if not name:
        # Looked into whosever it is: what is left of a mark may stand in any of them.
        return True
    # Of a job that took the run over, or being written now: see commit-v1, section 6, rule 3.
    if owner > claim or attempt in in_flight:
        return False
    return is_attempt_file(name) or is_temporary(name)


def _is_of_a_mark(store: Store, folder: str, deleted: Collection[str]) -> bool:
    """Whether unfinished objects in `folder` are of marks: of pins, notes, deletions.

    Beside the files of a committed or deleted attempt nothing else is ever put, and a mark that was
    not is of no use to anybody. Whose claim the attempt is does not matter.
    """
    top, _, attempt = folder.partition("/")
    step = parse_step_dir(top)
    if step is None or parse_save_id(attempt) is None:
        return False
    return f"{folder}/" in deleted or attempt in _named(store, step, set())


def _dead_in(store: Store, folder: str, *, claim: int, in_flight: Collection[str]) -> Iterator[str]:
    step = parse_step_dir(folder[:-1])
    assert step is not None
    names = store.list_children(folder)
    attempts = {name[:-1]: parse_save_id(name[:-1]) for name in names if name.endswith("/")}
    candidates = {
        save_id
        for save_id, owner in attempts.items()
        if owner is not None
        and save_id not in in_flight
        and (owner <= claim or is_marked_removed(store, step, save_id))
    }
    if candidates:
        # The manifest is read only after the listing: an attempt that committed in between is
        # named by it, so it cannot be taken for garbage.
        for save_id in sorted(candidates - _named(store, step, candidates)):
            yield f"{folder}{save_id}/"


def _named(store: Store, step: int, candidates: set[str]) -> set[str]:
    """Return the save_ids that the manifest of `step` needs, all when it cannot be read."""
    try:
        manifest = manifest_format.decode(read_manifest(store, step), step=step)
    except NotFound:
        return set()
    except (IntegrityError, IncompatibleError):
        return candidates  # a damaged or newer manifest still claims its files: leave them all
    return {manifest.save_id}


def _delete_attempt(store: Store, folder: str) -> None:
    names = [name for name in store.list_children(folder) if is_attempt_file(name)]
    store.delete(folder + name for name in names if name not in (INDEX, REMOVED))
    # The index goes last: while data is left, an operator can still see what it was. Behind it
    # what says that all of it may go.
    store.delete(folder + name for name in names if name == INDEX)
    store.delete(folder + name for name in names if name == REMOVED)
