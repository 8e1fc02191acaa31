"""A run: the checkpoints below one place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format.names import (
    DISCARDS,
    check_step,
    manifest_key,
    new_save_id,
    parse_claim,
    parse_save_id,
    parse_step_dir,
    step_dir,
)
from dist_ckpt.repository import discard
from dist_ckpt.repository.checkpoint import Checkpoint, deleted_meanwhile
from dist_ckpt.repository.commit import (
    Transaction,
    check_owner,
    take_claim,
)
from dist_ckpt.repository.detached import named_step
from dist_ckpt.repository.history import (
    History,
    Record,
    collect_garbage,
    delete_checkpoint,
    is_pinned,
    passing_by,
    pin,
    remembered,
    unpin,
)
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion, best_among
from dist_ckpt.repository.verify import Sample, VerifyReport, verify
from dist_ckpt.storage.base import Store
from dist_ckpt.threads import in_parallel, threads_for

# Claims rise with the steps.
_LOOKED_AT = 32


class Repository:
    """One run in one store. Holds no state of its own: what is stored is the truth."""

    def __init__(self, store: Store, *, similar: Callable[[], str] = str) -> None:
        """Name the run.

        Args:
            store: where it is.
            similar: says, where there is none, what else may be meant.
        """
        self.store = store
        self._similar = similar

    def steps(self) -> list[int]:
        """Return the committed steps, ascending, without those that this user may not look at.

        Raises:
            StorageError: the listing failed; an outage never looks like an empty run.
        """
        return self._committed_of(self.candidates())

    def _committed_of(self, steps: Sequence[int]) -> list[int]:
        found: list[int] = []

        def look(step: int) -> None:
            with passing_by(self.store, f"step {step}"):
                if self._is_committed(step):
                    found.append(step)

        in_parallel(look, steps, threads=threads_for(len(steps)))
        return sorted(found)

    def newest_first(self) -> Iterator[int]:
        """Yield the committed steps, descending; one size request each, when it is its turn.

        Raises:
            StorageError: see `steps`.
        """
        return filter(self._is_committed, self.candidates())

    def candidates(self) -> list[int]:
        """Return the steps that have a directory, descending: those with a manifest are committed.

        What a job gave up when it went back is not among them.

        Raises:
            StorageError: see `steps`.
            IntegrityError: it is not known what was given up; the message says what to do.
        """
        return self._listing()[0]

    def hidden(self) -> Mapping[int, bytes]:
        """Return the steps that a job gave up and that are there still, with their manifests."""
        return self._listing()[1]

    def _listing(self) -> tuple[list[int], Mapping[int, bytes]]:
        """Return the steps that have a directory, the hidden ones apart, descending."""
        names = {child[:-1] for child in self.store.list_children() if child.endswith("/")}
        found = (parse_step_dir(name) for name in names)
        steps = sorted((step for step in found if step is not None), reverse=True)
        # The listing itself says whether anybody ever went back: nothing more is asked otherwise.
        if DISCARDS not in names:
            return steps, {}
        hidden = discard.hidden(self.store, steps, discard.read(self.store))
        return [step for step in steps if step not in hidden], hidden

    def newer(self, step: int, *, besides: Collection[int] = ()) -> list[int]:
        """Return the committed steps above `step` that are not `besides`, ascending.

        Raises:
            StorageError: see `steps`.
        """
        # Chosen before they are looked at, as each look is a request.
        above = (found for found in self.candidates() if found > step and found not in besides)
        return sorted(filter(self._is_committed, above))

    def discard(self, *, claim: int, after: int) -> None:
        """Hide the checkpoints newer than `after` that were committed before `claim`.

        They are deleted by the first `collect` after a commit; until then they are there.
        """
        discard.put(self.store, claim=claim, after=after)

    def newest_now(self) -> Iterator[int]:
        """Yield the steps that have a directory, descending, those first that came meanwhile.

        A trainer that keeps one checkpoint commits the next and deletes the one that was listed:
        whoever opens them one by one goes on with what there is by then.

        Raises:
            StorageError: see `steps`.
        """
        seen: set[int] = set()
        while new := [step for step in self.candidates() if step not in seen]:
            seen.add(new[0])
            yield new[0]

    def latest(self) -> int | None:
        """Return the newest committed step, or None when there is none."""
        return next(self.newest_first(), None)

    def open(self, step: int) -> Checkpoint:
        """Open a committed checkpoint.

        Raises:
            NotFound: this is no run, or the step is not committed.
            IntegrityError: its manifest or index is damaged.
            IncompatibleError: it was written by a newer format.
        """
        step = check_step(step)
        try:
            return Checkpoint.read(self.store, step)
        except NotFound:
            raise self.not_found(step) from None

    def open_latest(self) -> Checkpoint:
        """Open the newest committed checkpoint; it is never exchanged for an older one.

        Raises:
            NotFound: this is no run, or nothing is committed in it.
            IntegrityError: its manifest or index is damaged.
        """
        # Listed anew each time: a trainer that keeps one deletes it when it commits the next.
        for step in self.newest_now():
            with suppress(NotFound):  # never committed, or deleted since the listing
                return Checkpoint.read(self.store, step)
        raise self.no_checkpoint()

    def claim(self, *, at_least: int = 1) -> int:
        """Take the run over: return the number of a new claim, higher than all before it.

        Raises:
            UsageError: the place is one checkpoint and no run, or the store cannot commit.
        """
        self._check_can_commit()
        return take_claim(self.store, at_least=at_least, before=self._before_any_claim)

    def _before_any_claim(self) -> int:
        # Only where nobody has claimed anything: begun inside of a checkpoint, a run would be a
        # training from zero where one was to go on, and a load of the place would not look at it.
        step = named_step(self.store)
        if step is not None:
            raise UsageError(
                f"{self.store.url} is one checkpoint, of step {step}, and no run: to go on with "
                f"its run give the folder that it is in (restore(step={step}) takes this very "
                "one), and to begin a run from it give a new folder and restore(url=...)"
            )
        return self._latest_claim()

    def _latest_claim(self) -> int:
        """Return the highest claim under which the newest checkpoints were written, 0 for none."""
        folders = (f"{step_dir(step)}/" for step in islice(self.candidates(), _LOOKED_AT))
        children = (name for folder in folders for name in self.store.list_children(folder))
        found = (parse_save_id(name.removesuffix("/")) for name in children)
        return max((claim for claim in found if claim is not None), default=0)

    def begin(self, step: int, claim: int) -> Transaction:
        """Begin an attempt to save `step` under `claim`, with a save_id of its own.

        Raises:
            AlreadyExists: the step is committed.
            FencedError: a newer claim owns the run.
            UsageError: the store cannot create atomically, or the step is no step.
        """
        step = self.check_free(step)
        check_owner(self.store, claim)
        return Transaction(self.store, step, new_save_id(claim))

    def check_free(self, step: int) -> int:
        """Return `step` as an `int` if whoever owns the run may save it.

        Raises:
            AlreadyExists: the step is committed.
            UsageError: the store cannot create atomically, or the step is no step.
        """
        step = check_step(step)
        self._check_can_commit()
        if self._is_committed(step):
            raise self._exists(step)
        return step

    def check_begin(self, step: int, claim: int | None, *, refused: Collection[int]) -> int:
        """Check that a training run may save `step` next; return the newest step, -1 for none.

        Args:
            step: what is to be saved.
            claim: that of the caller; None for one that looks before it takes the run over.
            refused: steps that the caller found damaged: they count as not committed.

        Raises:
            AlreadyExists: the step is committed.
            FencedError: a newer claim owns the run.
            UsageError: a newer step is committed, or the store cannot create atomically.
        """
        check_step(step)
        self._check_can_commit()
        # Before the step is judged: who was replaced is to hear that, not that the step is old.
        if claim is not None:
            check_owner(self.store, claim)
        # Asked one by one: nearly always the first is committed and counts.
        newest = next((found for found in self.newest_first() if found not in refused), -1)
        if step < newest and step not in refused and self._is_committed(step):
            raise self._exists(step)
        if step == newest:
            raise self._exists(step)
        if step < newest:
            raise UsageError(
                f"step {step} is older than the newest checkpoint in {self.store.url}, step "
                f"{newest}, and a restart would go on from that one: continue from step {newest}, "
                "which restore() returns, or save into another run",
                kind=ErrorKind.STEP_BEHIND,
            )
        return newest

    def verify(self, step: int, *, sample: Sample | None = None) -> VerifyReport:
        """Read a committed checkpoint and compare its bytes with their digests.

        Args:
            step: which.
            sample: a share of it; every byte for None. See `dist_ckpt.repository.verify`.

        Raises:
            NotFound: the step is not committed, or was deleted meanwhile.
            IncompatibleError: it was written by a newer format.
            StorageError: the backend failed.
        """
        try:
            checkpoint = self.open(step)
        except IntegrityError as error:
            # What files it has is not known, so none are counted.
            return VerifyReport(step, 0, 0, (error.message,))
        report = verify(checkpoint, sample=sample)
        # Where retention was faster files are missing, and nothing is damaged.
        if report.problems and not checkpoint.still_there():
            raise deleted_meanwhile(self.store, step)
        return report

    def records(self) -> list[Record]:
        """Return what the manifests say of the committed checkpoints, ascending.

        One whose manifest cannot be read has no record.

        Raises:
            StorageError: the backend failed.
        """
        return History(self.store).read(self.candidates())

    def retain(
        self,
        policy: KeepPolicy,
        *,
        claim: int,
        protected: Collection[int] = (),
        damaged: Collection[int] = (),
        history: History | None = None,
    ) -> Mapping[int, str]:
        """Delete what `policy` does not keep; return the deleted steps with the reasons.

        Pinned checkpoints and the newest one stay in any case.

        Args:
            policy: what to keep.
            claim: that of the caller.
            protected: steps that stay in any case.
            damaged: steps that are no use to a restart: they count for nothing, and are left for
                people to look at, as those are whose manifest cannot be read.
            history: what the caller has read already.

        Raises:
            FencedError: a newer claim owns the run, and may be restoring what would be deleted.
            StorageError: a listing or a deletion failed.
        """
        history = history or History(self.store)
        gone: dict[int, str] = {}

        def may_go(found: Sequence[Record]) -> list[Record]:
            # What is damaged takes no place: of three that are wanted three good ones stay.
            return removable([r for r in found if r.step not in damaged], policy, protected)

        for record in remembered(self.candidates(), history, may_go, self._committed_of):
            # One that this user may not delete, or that lies behind a link, keeps no other.
            with passing_by(self.store, f"step {record.step}"):
                # Right before the deletion, as people pin meanwhile: commit-v1, section 6, rule 5.
                if is_pinned(self.store, record.step, record.save_id):
                    continue
                # Only the owner deletes, and a newer claim may have been made since the commit.
                check_owner(self.store, claim)
                history.forget(record.step)  # first: half deleted it is no checkpoint either
                delete_checkpoint(self.store, record.step)
                gone[record.step] = f"not kept by {policy}"
        return gone

    def pin(self, step: int, *, reason: str = "") -> None:
        """Keep a committed checkpoint whatever any policy says, until `unpin`.

        Args:
            step: which one; pinned already, it stays as it is.
            reason: for people, stored in the pin.

        Raises:
            NotFound: the step is not committed, or was deleted meanwhile.
            StorageError: the pin could not be stored.
        """
        save_id = self.open(step).manifest.save_id
        pin(self.store, step, save_id, reason)
        # Retention may have looked for a pin just before and gone on to delete.
        if not self._is_committed(step):
            unpin(self.store, step, save_id)
            raise self.not_found(step)

    def unpin(self, step: int) -> None:
        """Let retention decide about `step` again; without a pin nothing happens.

        Raises:
            NotFound: the step is not committed.
        """
        unpin(self.store, step, self.open(step).manifest.save_id)

    def pinned(self) -> list[int]:
        """Return the pinned steps, ascending."""
        return [
            record.step
            for record in self.records()
            if is_pinned(self.store, record.step, record.save_id)
        ]

    def collect(self, *, claim: int, in_flight: Collection[str]) -> list[str]:
        """Remove the files of dead attempts; see `dist_ckpt.repository.history`."""
        return collect_garbage(self.store, claim=claim, in_flight=in_flight)

    def collect_hidden(self, *, claim: int) -> list[int]:
        """Delete what was given up; see `dist_ckpt.repository.discard.collect`."""
        return discard.collect(self.store, self.hidden(), claim=claim)

    def _check_can_commit(self) -> None:
        can = self.store.capabilities
        if not (can.atomic_create and can.strong_list):
            raise UsageError(
                f"{self.store.url} cannot create an object atomically, or not list it at once, so "
                "two jobs could commit to one run: choose another place, or, where no other job "
                "ever writes, open it by resolve(url, single_writer=True) and give that store in "
                "place of the url"
            )

    def _exists(self, step: int) -> AlreadyExists:
        return AlreadyExists(
            f"step {step} is already committed in {self.store.url}: save under another step",
            kind=ErrorKind.STEP_EXISTS,
        )

    def _is_committed(self, step: int) -> bool:
        try:
            self.store.size(manifest_key(step))
        except NotFound:
            return False
        return True

    def not_found(self, step: int) -> NotFound:
        """Return the error of a step that is not committed; it names the nearest that are."""
        steps = self.steps()
        if not steps:
            return self.no_checkpoint()
        nearest = sorted(sorted(steps, key=lambda each: abs(each - step))[:3])
        return NotFound(
            f"no checkpoint of step {step} in {self.store.url}: the nearest are "
            f"{', '.join(map(str, nearest))}",
            kind=ErrorKind.NO_CHECKPOINT,
        )

    def best(self, criterion: Criterion) -> int:
        """Return the step of the best checkpoint by `criterion`; nothing is taken over.

        Raises:
            NotFound: there is no run, or no checkpoint has the metric.
            StorageError: see `steps`.
        """
        records = self.records()
        # There may be checkpoints without a record: their manifests cannot be read.
        if not records and self.latest() is None:
            raise self.no_checkpoint()
        return best_among(records, criterion, where=self.store.url).step

    def no_checkpoint(self, looked_for: str = "") -> NotFound:
        """Return the error of a place without a committed checkpoint: an empty one, or another.

        Args:
            looked_for: what else was looked for in vain, for the message.
        """
        step = named_step(self.store)
        if step is not None:
            return self._one_checkpoint(step)
        # One object is enough to tell another place from an empty one.
        if next(iter(self.store.list_entries()), None) is not None:
            if (below := run_below(self.store)) is not None:
                return NotFound(
                    f"{self.store.url} is no run, but a folder of runs, such as {below}: name one",
                    kind=ErrorKind.NO_RUN,
                )
            besides = f": {looked_for}" if looked_for else ""
            return NotFound(
                f"no committed checkpoint in {self.store.url}{besides}",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        nothing = looked_for or "no committed checkpoint either"
        return NotFound(
            f"{self.store.url} is no run: there is nothing there, {nothing}; check the path"
            f"{self._similar()}",
            kind=ErrorKind.NO_RUN,
        )

    def _one_checkpoint(self, step: int) -> NotFound:
        above, _, name = self.store.url.rpartition("/")
        # Copied or renamed it is of no run.
        whose = (
            f"of the run {above}: to the command line that is {above}@{step}"
            if parse_step_dir(name) == step
            else "by itself: export, load and open_checkpoint read it there"
        )
        return NotFound(
            f"{self.store.url} is no run, but the checkpoint of step {step} {whose}",
            kind=ErrorKind.NO_CHECKPOINT,
        )


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


# Finding runs below a place.


_DEEP = 3
_FEW_LISTINGS = 16


def folders_below(
    store: Store, unlisted: Callable[[str, StorageError], None]
) -> Iterator[tuple[str, list[str]]]:
    """Yield a place and the folders up to three below it, each with what is in it; nearest first.

    A run is not looked into: what lies in it is its own.

    Args:
        store: the place.
        unlisted: is given each folder that cannot be listed, and why; the others follow if it
            returns.
    """
    folders = [""]
    for depth in range(_DEEP + 1):
        below: list[str] = []
        for folder in folders:
            children: list[str] = []
            try:
                children = store.list_children(folder)
            except StorageError as error:
                unlisted(folder, error)
            yield folder, children
            if depth < _DEEP and not has_steps(children):
                below += [folder + name for name in children if name.endswith("/")]
        folders = below


def run_below(store: Store) -> str | None:
    """Return the url of a run below a place that is none; None where none is found.

    Only so many folders are looked into that it is cheap on any storage, and none of those that
    this user may not list.
    """
    found = folders_below(store, lambda _folder, _error: None)
    _, children = next(found)
    try:
        if is_run(store, children):
            return None
    except StorageError:
        return None  # it may be one, and whoever goes on to use it is told
    for folder, inside in islice(found, _FEW_LISTINGS):
        if has_steps(inside):
            return f"{store.url}/{folder}".rstrip("/")
    return None


def is_run(store: Store, children: Collection[str]) -> bool:
    """Tell whether `store`, with these names in it, is a run: one has steps, or jobs claimed it.

    Raises:
        StorageError: what is called as the claims of a run cannot be listed.
    """
    return has_steps(children) or (
        "claims/" in children and has_claims(store.list_children("claims/"))
    )


def has_steps(children: Iterable[str]) -> bool:
    """Tell whether among the names in a folder there are those of steps, as a run has them."""
    return any(name.endswith("/") and parse_step_dir(name[:-1]) is not None for name in children)


def has_claims(children: Iterable[str]) -> bool:
    """Tell whether among the names in a folder there are those of claims on a run."""
    return any(parse_claim(child) is not None for child in children)
