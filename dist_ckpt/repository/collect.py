"""Removing what is no longer wanted, in an order that never leaves half a checkpoint listed.

Only names that dist_ckpt itself writes are ever deleted (commit-v1, section 6): anything else that
somebody put into the run stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.events import tell_once
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.names import (
    INDEX,
    REMOVED,
    is_attempt_file,
    manifest_key,
    parse_save_id,
    parse_step_dir,
    step_dir,
)
from dist_ckpt.repository import status
from dist_ckpt.repository.checkpoint import read_manifest
from dist_ckpt.repository.history import History, Record, is_marked_removed
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.storage.base import Store, Sweeper, is_temporary
from dist_ckpt.threads import map_in_parallel, threads_for

_LOOKED_AT_ONCE = 128
_ASKED_AGAIN = 2


def removable(
    records: Collection[Record], policy: KeepPolicy, protected: Collection[int]
) -> list[Record]:
    """Return the checkpoints that may go, the oldest first; the newest never is one of them."""
    ordered = sorted(records, key=lambda record: record.step)
    kept = policy.kept(ordered)
    # The newest is kept whatever a policy says: it is what a restart needs.
    return [
        record
        for record in ordered[:-1]
        if record.step not in kept and record.step not in protected
    ]


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
        for step in before:
            history.forget(step)
        before = set()


def delete_checkpoint(store: Store, step: int) -> None:
    """Remove one checkpoint: from the first deletion on it does not exist.

    Raises:
        StorageError: a deletion failed; what remains is garbage for `collect_garbage`.
    """
    store.delete([manifest_key(step)])
    for name in store.list_children(f"{step_dir(step)}/"):
        if name.endswith("/") and parse_save_id(name[:-1]) is not None:
            _delete_attempt(store, f"{step_dir(step)}/{name}")


def delete_attempt(store: Store, step: int, save_id: str) -> None:
    """Remove the files of one attempt that no manifest names any more."""
    _delete_attempt(store, f"{step_dir(step)}/{save_id}/")


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
