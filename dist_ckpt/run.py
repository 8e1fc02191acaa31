"""A run as who operates it sees it: what is there, is it whole, what may go. Nothing needs torch.

```python
import dist_ckpt
from dist_ckpt import keep

dist_ckpt.save({"n": 1}, "runs/looked-at", step=10, metrics={"loss": 2.0})
run = dist_ckpt.Run("runs/looked-at")
assert run.latest() == run.best("loss") == 10
assert run.verify(10).ok
assert [each.kept for each in run.plan_keep(keep.latest(3))] == [True]
```

Reading claims nothing, and deleting does not take a run from the job that trains in it: what that
job writes, its newest checkpoint, its best ones, the one it went on from and pinned ones are never
touched.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import attempt_dir, check_step, manifest_key
from dist_ckpt.repository import copying, status
from dist_ckpt.repository import keep as keeping
from dist_ckpt.repository import scratch as scratches
from dist_ckpt.repository.checkpoint import Checkpoint, deleted_meanwhile
from dist_ckpt.repository.commit import highest_claim, read_manifest
from dist_ckpt.repository.copying import Copied, Difference, ValuesDiffer
from dist_ckpt.repository.destination import check_new_run
from dist_ckpt.repository.history import (
    Record,
    collect_garbage,
    delete_attempt,
    delete_checkpoint,
    garbage,
    is_pinned,
    mark_removed,
)
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.listed import (
    KeepDecision,
    Listed,
    bests_of,
    decisions,
    look_at_all,
    marked,
    newest_down,
    protected,
    runs_below,
    similar_beside,
    tell_bad,
)
from dist_ckpt.repository.ranking import Criterion, Mode, best_among
from dist_ckpt.repository.repository import Repository
from dist_ckpt.repository.status import JobStatus
from dist_ckpt.repository.verify import Sample, VerifyReport
from dist_ckpt.storage.base import Store, delete_exactly
from dist_ckpt.storage.resolve import Place, resolve

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What a mirroring did.

    Attributes:
        copied: the copies that were made.
        removed: the steps that were deleted at the other place.
    """

    copied: tuple[Copied, ...]
    removed: tuple[int, ...]


class Run:
    """A run at a place. Every call looks anew: what is stored is the truth.

    Attributes:
        url: where it is, without secrets.
        store: the place itself.
    """

    def __init__(self, url: Place, *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Name the run; nothing is contacted.

        Args:
            url: a path, a URL, or a `Store`.
            storage_options: for the backend, see `dist_ckpt.storage.resolve`.

        Raises:
            UsageError: the url is malformed.
        """
        self.store = (
            url if isinstance(url, Store) else resolve(url, storage_options=storage_options)
        )
        self.url = self.store.url
        # Nearly always a place without a run is a mistyped one.
        beside = partial(similar_beside, self.url, storage_options)
        self._repository = Repository(self.store, similar=beside)
        # Of a thousand copies the first alone looks whether a run may be there: it lists all steps.
        self._copied_to: set[str] = set()

    def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        return self._repository.steps()

    def runs_below(self) -> list[str]:
        """Return the urls of the runs at or below this place, up to three folders below."""
        return list(runs_below(self.store))

    def latest(self) -> int | None:
        """Return the newest step that can be read, None where nothing is committed.

        A warning tells what is newer and cannot. See `newest_down`.

        Raises:
            CheckpointError: none that is there can be read.
        """
        newest = self._newest()
        return None if newest is None else newest.step

    def newest_down(self) -> list[Listed]:
        """Return the newest checkpoint whose manifest can be read, last, behind newer ones."""
        return newest_down(self.store, self._repository.newest_now())

    def status(self) -> JobStatus | None:
        """Return what the job that took the run over last said of itself, None for nothing."""
        return status.newest(self.store)

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """Return the step with the best value of `metric`, None where no checkpoint has one.

        Raises:
            UsageError: `mode` is neither "min" nor "max", or the metric has no name.
        """
        ranked = Criterion(metric, mode).ranked(self.records())
        return ranked[0].step if ranked else None

    def criteria(self) -> list[Criterion]:
        """Return by which metrics the job of this run keeps a best, as its newest checkpoint says.

        Raises:
            NotFound: there is none.
        """
        return bests_of(self.newest())

    def records(self) -> list[Record]:
        """Return what the manifests say of the committed checkpoints, ascending.

        A warning tells those that cannot be read.
        """
        listed = self.listed()
        tell_bad(self.store, listed)
        return [each.record for each in listed if each.record is not None]

    def listed(self) -> list[Listed]:
        """Return every step that is there, ascending, damaged and unfinished ones too.

        Raises:
            NotFound: this is no run.
            StorageError: the listing failed.
        """
        steps = sorted(self._repository.candidates())
        if not steps:
            raise self._repository.no_checkpoint()
        return marked(look_at_all(self.store, steps))

    def manifest(self, step: int) -> Manifest:
        """Return what was committed under `step`.

        Raises:
            NotFound: it is not committed; the nearest steps are named.
            IntegrityError: the manifest is damaged.
        """
        return manifest_format.decode(self._manifest_bytes(step), step=check_step(step))

    def newest(self) -> Manifest:
        """Return what was committed as the `latest`; no older manifest is looked at.

        Raises:
            NotFound: there is none.
            CheckpointError: none that is there can be read.
        """
        newest = self._newest()
        if newest is None or newest.manifest is None:
            raise self._repository.no_checkpoint()
        return newest.manifest

    def open(self, step: int) -> Checkpoint:
        """Open a committed checkpoint. See `manifest` for errors."""
        return self._repository.open(step)

    def verify(self, step: int, *, sample: Sample | None = None) -> VerifyReport:
        """Compare the bytes of a checkpoint with their digests.

        Args:
            step: which.
            sample: (which, of how many) shares of its blocks to read; all of them for None. With
                (0, 1) no data is read: only descriptions and sizes are compared.

        Raises:
            NotFound: it is not committed.
            IncompatibleError: it was written by a newer format.
            StorageError: the backend failed, which says nothing about the checkpoint.
            UsageError: there is no such share.
        """
        return self._repository.verify(step, sample=sample)

    def pin(self, step: int, *, reason: str = "") -> None:
        """Keep a checkpoint whatever any policy says, until `unpin`."""
        # A pin of a step that is not there would be a mark of nothing; the error names the nearest.
        self._manifest_bytes(step)
        self._repository.pin(step, reason=reason)

    def unpin(self, step: int) -> None:
        """Let policies decide about `step` again."""
        self._manifest_bytes(step)
        self._repository.unpin(step)

    def plan_keep(self, policy: KeepPolicy) -> list[KeepDecision]:
        """Return what `policy` says of every checkpoint, ascending; nothing is done.

        Damaged ones are left for people to look at, and keep no other.

        Raises:
            UsageError: no checkpoint has a metric by which `policy` keeps the best: mistyped, it
                would keep none. Or it is no policy.
        """
        checked = keeping.checked_keep(policy)
        # `keep=None` of a Checkpointer keeps all; here that would be a plan of nothing.
        if checked is None:
            raise UsageError(
                "say what to keep, by a policy of dist_ckpt.keep such as keep.latest(3)"
            )
        return decisions(self.listed(), checked, where=self.url)

    def keep(self, policy: KeepPolicy) -> list[KeepDecision]:
        """Delete what `policy` does not keep, the oldest first; return what `plan_keep` said.

        Where this is cut off, the next call ends it.

        Raises:
            StorageError: a deletion failed.
        """
        decisions = self.plan_keep(policy)
        deleted = [self._delete(each.step, pinned_too=False) for each in decisions if not each.kept]
        # Also what a deletion that was cut off has left.
        self._sweep(deleted=deleted)
        return decisions

    def remove(self, step: int, *, force: bool = False) -> None:
        """Delete one checkpoint.

        Args:
            step: which.
            force: also where it is the newest, the best by a metric that the run keeps it by, the
                one that the run went on from, pinned or damaged.

        Raises:
            NotFound: it is not committed.
            UsageError: it is protected, and `force` was not given (`ErrorKind.PROTECTED`).
        """
        self._manifest_bytes(step)
        # Of the whole list: which is the newest, or the best, shows beside the others alone.
        why = protected(self.listed()).get(step)
        if why and not force:
            raise UsageError(
                f"step {step} in {self.url} is not removed: it is {why}; to mean it, give "
                "force=True (--force)",
                kind=ErrorKind.PROTECTED,
            )
        self._delete(step, pinned_too=force)

    def sweep(self, *, older_than: timedelta | None = None) -> list[str]:
        """Remove what jobs left that were killed, or `doctor` or `bench`; return what folders went.

        What the job that owns the run writes is not touched, as nobody else can tell it from what
        that job gave up: that goes after its next commit.

        Args:
            older_than: only where nothing was put for so long, by the clock of this host.

        Raises:
            NotFound: there is nothing at all.
            StorageError: this user may not remove some of it; all else is gone.
            UsageError: this storage does not say when an object was put, or that is no age.
        """
        if not isinstance(older_than, timedelta | None):
            raise UsageError(f"older_than= takes a timedelta, not {older_than!r}")
        refused: list[str] = []
        gone = self._sweep(older_than=older_than, refused=refused)
        if refused:
            raise StorageError(
                f"{len(gone)} folders were removed from {self.url}, and this is left as it is: "
                f"{'; '.join(refused)}",
                kind=ErrorKind.PERMISSION,
            )
        # Only now: uploads that were given up are gone, which no listing shows.
        if not gone and not self.store.list_children():
            raise self._repository.no_checkpoint()
        return gone

    def _sweep(
        self,
        *,
        older_than: timedelta | None = None,
        deleted: Collection[str] = (),
        refused: list[str] | None = None,
    ) -> list[str]:
        before = None if older_than is None else time.time() - older_than.total_seconds()
        newest = highest_claim(self.store)
        # Where no job ever was there are copies, and of those only the age tells who is gone.
        older = sys.maxsize if before is not None and not newest else newest - 1
        # What may be in flight bears the highest claim, and `older` is below that.
        gone = collect_garbage(
            self.store, claim=older, in_flight=(), before=before, deleted=deleted, refused=refused
        )
        return gone + scratches.remove_leftovers(self.store, before=before, refused=refused)

    def leftovers(self) -> list[str]:
        """Return the folders that `sweep` would remove; nothing is done."""
        # What bears the highest claim may be written now.
        older = highest_claim(self.store) - 1
        return [
            *garbage(self.store, claim=older, in_flight=()),
            *scratches.leftovers(self.store),
        ]

    def copy(self, step: int, to: Place | Run) -> Copied:
        """Copy a checkpoint into another run, verified, and committed there last.

        A copy that was cut off is gone on with: files that are there and whole stay. Of one that
        cannot become whole nothing stays.

        Raises:
            AlreadyExists: another checkpoint of this step is there.
            IntegrityError: the source is damaged; nothing was committed.
            NotFound: it is not committed, or was deleted meanwhile.
            UsageError: the other place is a folder of runs, or among the files of a run.
        """
        target = to if isinstance(to, Run) else Run(to)
        if target.url not in self._copied_to:
            check_new_run(target.store)
            self._copied_to.add(target.url)
        source = self.open(step)
        try:
            return copying.copy(source, target.store)
        except IntegrityError as error:
            # What is damaged here will be so the next time: there is nothing to go on with.
            copying.give_up(source, target.store)
            # Where retention was faster files are missing, and nothing is damaged.
            if not source.still_there():
                raise deleted_meanwhile(self.store, step) from error
            raise

    def mirror(
        self, to: Place | Run, *, best: Criterion | None = None, keep: int | None = None
    ) -> Mirrored:
        """Copy the newest checkpoint, and the best, into another run, where they are not there yet.

        One that is deleted here meanwhile is passed over, and a metric that none has yet is told by
        a warning: the next call finds what came after it.

        Args:
            to: the other run.
            best: by what one is the best; None copies the newest alone.
            keep: how many of the newest stay there beside the best; None deletes nothing.

        Raises:
            NotFound: there is no run to copy.
            AlreadyExists: another checkpoint of such a step is there.
            UsageError: `keep` would delete in this very run: the other place is the same.
        """
        if not isinstance(best, Criterion | None):
            raise UsageError(f"best= takes a Criterion, not {best!r}")
        target = to if isinstance(to, Run) else Run(to)
        # First: a `keep` that is malformed is told before anything is copied.
        newest = None if keep is None else keeping.latest(keep)
        wanted = {self.newest().step}
        if best is not None:
            try:
                wanted.add(best_among(self.records(), best, where=self.url).step)
            except NotFound as error:
                _log.warning("only the newest is copied: %s", error.message)
        copied = []
        for step in sorted(wanted):
            with suppress(NotFound):
                copied.append(self.copy(step, target))
        decided: list[KeepDecision] = []
        if newest is not None and target.latest() is not None:
            # A metric that no checkpoint has is refused by a policy, as a mistyped one.
            has_best = best is not None and best.ranked(target.records())
            kept = keeping.best(best.metric, mode=best.mode) if best and has_best else newest
            policy = newest | kept
            gone = any(not each.kept for each in target.plan_keep(policy))
            # What goes there must not be what is mirrored: there is no copy of that.
            if gone and scratches.is_same_place(self.store, target.store):
                raise UsageError(
                    f"{target.url} is {self.url} itself, of which a mirror deletes nothing: name "
                    "another place"
                )
            decided = target.keep(policy)
        return Mirrored(
            tuple(each for each in copied if each.files),
            tuple(each.step for each in decided if not each.kept),
        )

    def diff(self, step: int, other: int, *, of: Run | None = None) -> list[Difference]:
        """Return the tensors that differ between two checkpoints by their digests; no data is read.

        Args:
            step: one of this run.
            other: the other one.
            of: its run; this one for None.
        """
        return copying.diff(self.open(step), (of or self).open(other))

    def diff_values(self, step: int, other: int, *, of: Run | None = None) -> list[ValuesDiffer]:
        """Return whose Python values differ by their digests; see `diff`."""
        return copying.diff_values(self.open(step), (of or self).open(other))

    def _delete(self, step: int, *, pinned_too: bool) -> str:
        """Delete a checkpoint; return the folder of its files, "" for nothing that is known of."""
        try:
            data = read_manifest(self.store, step)
            save_id = manifest_format.decode(data, step=step).save_id
        except NotFound:
            return ""  # the retention of the job was faster
        except (IntegrityError, IncompatibleError):
            delete_checkpoint(self.store, step)  # only asked for by name, and forced
            return ""
        if not pinned_too and is_pinned(self.store, step, save_id):
            return ""  # since the plan was made
        # First: should this be cut off, a sweep knows by it that the files may go.
        mark_removed(self.store, step, save_id)
        # Itself alone: a job that went back may have saved the step anew since the look.
        delete_exactly(self.store, manifest_key(step), data)
        # Behind the manifest: from there on no reader looks for them.
        delete_attempt(self.store, step, save_id)
        return attempt_dir(step, save_id)

    def _newest(self) -> Listed | None:
        tell_bad(self.store, found := self.newest_down())
        if found and found[-1].manifest is None:
            self.manifest(found[0].step)  # raises why it cannot be read
        return found[-1] if found else None

    def _manifest_bytes(self, step: int) -> bytes:
        try:
            return read_manifest(self.store, check_step(step))
        except NotFound:
            raise self._repository.not_found(step) from None
