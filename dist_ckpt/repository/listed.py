"""What is there: runs below a place, and what is there of a run, step by step.

One request for the manifest of a step, several at once, and one listing beside it; where there are
no folders a listing of the run, by the page, in place of those of its steps.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal, TypeAlias

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    NotFound,
    StorageError,
    UsageError,
    near,
)
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import (
    EPOCH_NOTE,
    PIN,
    attempt_dir,
    parse_save_id,
    step_dir,
)
from dist_ckpt.repository import keep as keeping
from dist_ckpt.repository.commit import highest_claim, read_manifest
from dist_ckpt.repository.history import Record, read_epoch_note
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.repository.repository import folders_below, has_steps, removable
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place, resolve
from dist_ckpt.threads import map_in_parallel

State: TypeAlias = Literal[
    "committed", "damaged", "newer format", "unreadable", "in flight", "aborted"
]
"""What is known of a step. The last two have files and no manifest: of the newest job of the run,
which may be saving it, and of one that was replaced."""

Marks: TypeAlias = Mapping[str, Collection[str]]
"""Which of the files that say something of a checkpoint there are, by its folder, which ends in
a slash."""

_AT_ONCE = 16
_TRIED = 8
# One page, of a thousand names, in place of ten listings at least.
_FILES_A_STEP = 100

_BEST = "best "
_WHY_BAD: Mapping[State, str] = {
    "damaged": "damaged",
    "newer format": "of a newer format",
    "unreadable": "one that this user may not read",
}

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class Listed:
    """One step of a run, as its manifest describes it.

    Attributes:
        step: the training step.
        state: whether it is a checkpoint.
        marks: of `latest`, `pinned` and, by each metric of the run, `best METRIC` those it has; and
            of how many hosts this is the folder of one, where each has a folder of its own.
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
    def is_bad(self) -> bool:
        """Whether there is a manifest, and it cannot be read."""
        return self.state in _WHY_BAD

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


def look(store: Store, step: int, marks: Marks | None = None) -> Listed:
    """Return what is there of `step`.

    Args:
        store: where the run is.
        step: which.
        marks: those of the whole run, where they are known.

    Raises:
        StorageError: the backend failed, other than by refusing this user.
    """
    try:
        manifest = manifest_format.decode(read_manifest(store, step), step=step)
        return _described(store, manifest, marks)
    except NotFound:
        return _unfinished(store, step)
    except StorageError as error:
        if error.kind is not ErrorKind.PERMISSION:
            raise
        return Listed(step, "unreadable", problem=error.message)
    # Before the last clause, which would take it: a newer format is no damage.
    except IncompatibleError as error:
        return Listed(step, "newer format", problem=error.message)
    except CheckpointError as error:
        return Listed(step, "damaged", problem=error.message)


def look_at_all(store: Store, steps: Sequence[int]) -> list[Listed]:
    """Return what is there of each of `steps`; see `look`."""
    flat = store.capabilities.flat
    marks = _marks(store, len(steps)) if flat else None
    one = partial(look, store, marks=marks)
    # A server is waited for, and several at once wait for it together. A disk of this host has most
    # of it in memory: there threads only take the interpreter from one another, which doubles the
    # time. What a network file system is tells the look at the first ones.
    tried = [] if flat else steps[:_TRIED]
    began, worked = time.perf_counter(), time.thread_time()
    found = [one(step) for step in tried]
    waited = time.perf_counter() - began > 2 * (time.thread_time() - worked)
    threads = _AT_ONCE if flat or waited else 1
    return found + map_in_parallel(one, steps[len(tried) :], threads=threads)


def _marks(store: Store, nsteps: int) -> Marks | None:
    """Return the marks of a run, None if it has so many files that its steps are asked faster."""
    marks: dict[str, set[str]] = {}
    for number, entry in enumerate(store.list_entries()):
        if number >= _FILES_A_STEP * nsteps:
            return None
        folder, _, name = entry.key.rpartition("/")
        if name in (PIN, EPOCH_NOTE):
            marks.setdefault(f"{folder}/", set()).add(name)
    return marks


def newest_down(store: Store, newest_first: Iterable[int]) -> list[Listed]:
    """Return what there is down to the latest checkpoint, which is the newest that can be read.

    That one is the last in the list, if there is one. What stands before it is newer and was
    committed, but cannot be read. Here alone it is decided which one is the latest, and by
    `marked` likewise of a list of all.

    Args:
        store: where the run is.
        newest_first: its steps, descending; no more are looked at than must be.

    Raises:
        StorageError: see `look`.
    """
    found = []
    for step in newest_first:
        each = look(store, step)
        if each.is_bad or each.manifest is not None:
            found.append(each)
        if each.manifest is not None:
            break
    return found


def tell_bad(store: Store, listed: Iterable[Listed]) -> None:
    """Warn of what was committed and cannot be read, as whoever chooses takes another one."""
    for each in listed:
        if each.is_bad:
            _log.warning("step %d in %s was passed over: %s", each.step, store.url, each.problem)


def _unfinished(store: Store, step: int) -> Listed:
    """Return what a step without a manifest is: of the newest job, or of one before."""
    names = store.list_children(f"{step_dir(step)}/")
    owners = [parse_save_id(name.removesuffix("/")) or 0 for name in names]
    # Whoever has the highest claim may be writing this; everybody else is fenced.
    if max(owners, default=0) < highest_claim(store):
        problem = "no manifest: a job that was replaced did not end it; sweep removes it"
        return Listed(step, "aborted", problem=problem)
    problem = "no manifest yet: the newest job of the run is saving it, or was cut off"
    return Listed(step, "in flight", problem=problem)


def _described(store: Store, manifest: Manifest, marks: Marks | None) -> Listed:
    step, save_id = manifest.step, manifest.save_id
    folder = attempt_dir(step, save_id)
    # One listing for all marks: asking a shared folder for a file that it lacks takes several looks
    # each time, as another host may just have put it there.
    names = store.list_children(folder) if marks is None else marks.get(folder, ())
    note = read_epoch_note(store, step, save_id) if EPOCH_NOTE in names else None
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


def marked(listed: Sequence[Listed]) -> list[Listed]:
    """Return the steps of a run with the marks that one has among all of them.

    Args:
        listed: every step, ascending.
    """
    good = [each for each in listed if each.manifest is not None]
    if not good:
        return list(listed)
    records = [each.record for each in good if each.record is not None]
    marks: dict[int, list[str]] = {good[-1].step: ["latest"]}
    newest = good[-1].manifest
    for criterion in [] if newest is None else bests_of(newest):
        for best in criterion.ranked(records)[:1]:
            marks.setdefault(best.step, []).append(f"{_BEST}{criterion.metric}")
    return [replace(each, marks=(*marks.get(each.step, ()), *each.marks)) for each in listed]


def bests_of(newest: Manifest) -> list[Criterion]:
    """Return by which metrics the job that saved `newest` looks for the best.

    What is said of that in words that this program does not know is passed over.
    """
    names = newest.origin.get("best")
    found = []
    for name in names if isinstance(names, list) else ():
        with suppress(UsageError):
            found.append(Criterion.parse(str(name)))
    return found


def protected(listed: Sequence[Listed]) -> dict[int, str]:
    """Return, by step, why a checkpoint is not deleted whatever a policy says.

    Args:
        listed: every step of the run, ascending, as `marked` returns them.
    """
    found = {each.step: _WHY_BAD[each.state] for each in listed if each.is_bad}
    for each in listed:
        for mark in each.marks:
            if mark.startswith(_BEST):
                found[each.step] = f"the best by {mark.removeprefix(_BEST)}"
    found |= {each.step: "pinned" for each in listed if "pinned" in each.marks}
    good = [each for each in listed if each.manifest is not None]
    if good and (newest := good[-1]).manifest is not None:
        parent = newest.manifest.parent_step
        if parent is not None:
            # By this a job tells which one it restored: it may go back to it.
            found.setdefault(parent, "the one that the run went on from")
        # Last, as it holds whatever else was said of it.
        found[newest.step] = "the newest"
    return found


@dataclass(frozen=True, slots=True)
class KeepDecision:
    """What a policy says of one checkpoint.

    Attributes:
        step: which.
        kept: whether it stays.
        reasons: why it stays; of one that goes, which policy does not want it.
        nbytes: how many bytes its files hold.
    """

    step: int
    kept: bool
    reasons: tuple[str, ...]
    nbytes: int


def decisions(
    listed: Sequence[Listed], policy: keeping.KeepPolicy, *, where: str
) -> list[KeepDecision]:
    """Return what `policy` says of each checkpoint; see `Run.plan_keep`.

    Args:
        listed: every step of the run at `where`, ascending, as `marked` returns them.
        policy: what to keep.
        where: for messages.
    """
    good = {each.step: each for each in listed if each.record is not None}
    records = [each.record for each in good.values() if each.record is not None]
    keeping.check_metrics(policy, records, where=where)
    reasons = policy.kept(records)
    kept = protected(listed)
    # By what decides about deletions as well, so that a plan says what will be done.
    gone = {record.step for record in removable(records, policy, set(kept))}
    found = []
    for each in listed:
        nbytes = each.nbytes or 0
        if each.step in gone:
            found.append(KeepDecision(each.step, False, (f"not kept by {policy}",), nbytes))
        elif each.step in good:
            why = tuple(filter(None, (kept.get(each.step, ""), reasons.get(each.step, ""))))
            found.append(KeepDecision(each.step, True, why, nbytes))
        elif each.is_bad:
            found.append(KeepDecision(each.step, True, (each.state,), 0))
    return found


def runs_below(url: Place, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield the urls of the runs at or below a place, up to three folders below it.

    A warning tells the folders below it that this user may not list.

    Raises:
        StorageError: a listing failed.
    """
    store = url if isinstance(url, Store) else resolve(url, storage_options=storage_options)

    def unlisted(folder: str, error: StorageError) -> None:
        # One of somebody else, as `lost+found`, hides no run beside it.
        if not folder or error.kind is not ErrorKind.PERMISSION:
            raise error
        _log.warning("%s", error.message)

    for folder, children in folders_below(store, unlisted):
        if has_steps(children):
            yield f"{store.url}/{folder}".rstrip("/")


def similar_beside(url: str, storage_options: Mapping[str, Any] | None) -> str:
    """Return the names beside `url` that are like its own, as the end of a message; "" for none.

    Where nobody may look there is nothing to say.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    try:
        store = resolve(parent, storage_options=storage_options)
        try:
            children = store.list_children()
        finally:
            store.close()
    except CheckpointError:
        return ""
    # A run is a folder: files beside it are no names that were meant.
    # Nor is this one: it may be a run that has no checkpoint yet.
    folders = [child[:-1] for child in children if child.endswith("/") and child[:-1] != name]
    # Behind an `@` stands which checkpoint, for who knows it by the commands.
    run, at, which = name.rpartition("@")
    if at and run in folders:
        # To the library a step is an argument of its own, so here it may well be one.
        wrong = not re.fullmatch(r"[0-9]+|latest|newest|best", which)
        said = f" {which!r} is no step, as 100, latest and best are" if wrong else ""
        return f" (did you mean {run!r}?{said})"
    own = next((each for each in folders if re.fullmatch(rf"{re.escape(name)}@\w+", each)), None)
    if own is not None:
        return f" (did you mean {own!r}? To a command that is {own + '@latest'!r}, or @STEP)"
    return near(name, folders) or near(run, folders)
