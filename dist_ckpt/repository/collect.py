"""Removing what is no longer wanted, in an order that never leaves half a checkpoint listed.

Only names that dist_ckpt itself writes are ever deleted (commit-v1, section 6): anything else that
somebody put into the run stays where it is.
"""

from __future__ import annotations

from collections.abc import Collection

from dist_ckpt.errors import IncompatibleError, IntegrityError, NotFound
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.names import (
    INDEX,
    is_attempt_file,
    manifest_key,
    parse_save_id,
    parse_step_dir,
    step_dir,
)
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.storage.base import Store, Sweeper, read_all


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


def delete_checkpoint(store: Store, step: int) -> None:
    """Remove one checkpoint: from the first deletion on it does not exist.

    Raises:
        StorageError: a deletion failed; what remains is garbage for `collect_garbage`.
    """
    store.delete([manifest_key(step)])
    for name in store.list_children(f"{step_dir(step)}/"):
        if name.endswith("/") and parse_save_id(name[:-1]) is not None:
            _delete_attempt(store, f"{step_dir(step)}/{name}")


def collect_garbage(store: Store, *, claim: int, in_flight: Collection[str]) -> list[str]:
    """Remove the files of attempts that can no longer commit; return their folders.

    An attempt is dead when its claim is not newer than `claim`, no manifest names it, and it is
    not in `in_flight`.

    Args:
        store: where the run is.
        claim: the claim of the caller, which owns the run.
        in_flight: save_ids that the caller is writing now.

    Raises:
        StorageError: a listing or a deletion failed.
    """
    removed: list[str] = []
    for child in store.list_children():
        step = parse_step_dir(child.removesuffix("/")) if child.endswith("/") else None
        if step is None:
            continue
        names = store.list_children(child)
        attempts = {name[:-1]: parse_save_id(name[:-1]) for name in names if name.endswith("/")}
        candidates = {
            save_id
            for save_id, owner in attempts.items()
            if owner is not None and owner <= claim and save_id not in in_flight
        }
        if candidates:
            # The manifest is read only after the listing: an attempt that committed in between is
            # named by it, so it cannot be taken for garbage.
            for save_id in sorted(candidates - _named(store, step, candidates)):
                _delete_attempt(store, f"{child}{save_id}/")
                removed.append(f"{child}{save_id}/")
    if isinstance(store, Sweeper):
        store.sweep()  # unfinished objects of killed writers
    return removed


def _named(store: Store, step: int, candidates: set[str]) -> set[str]:
    """Return the save_ids that the manifest of `step` needs, all when it cannot be read."""
    try:
        manifest = manifest_format.decode(read_all(store, manifest_key(step)), step=step)
    except NotFound:
        return set()
    except (IntegrityError, IncompatibleError):
        return candidates  # a damaged or newer manifest still claims its files: leave them all
    return {manifest.save_id}


def _delete_attempt(store: Store, folder: str) -> None:
    names = [name for name in store.list_children(folder) if is_attempt_file(name)]
    store.delete(folder + name for name in names if name != INDEX)
    # The index goes last: while data is left, an operator can still see what it was.
    store.delete(folder + name for name in names if name == INDEX)
