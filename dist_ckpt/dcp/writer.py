"""A storage writer for torch.distributed.checkpoint: real checkpoints under the stock entry points.

The stock protocol is a plan round and a write round, both of which carry errors to every rank, so
no round of our own is needed: rank 0 begins the attempt while it has all plans, and commits when
it has all results.

All calls of one save come on one thread, and a thread has one save at a time: there its state is
kept (`_OfThread`). What the other ranks send for it bears its token, so that none takes what is
another's.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dist_ckpt import events
from dist_ckpt.dcp import turns
from dist_ckpt.dcp.commit import StockAttempt, StockReport, file_images, resolve_share, tree_file
from dist_ckpt.dcp.edge import CheckpointId, names_step, open_store, plain_errors, step_of
from dist_ckpt.dcp.items import described, without_empty
from dist_ckpt.dcp.planners import forget, forget_global, whole_global, whole_local
from dist_ckpt.errors import CheckpointError, ErrorKind, UsageError, without_secrets
from dist_ckpt.format.files import digest_blocks
from dist_ckpt.format.names import check_step
from dist_ckpt.planning.files import StagedFile, WrittenFile
from dist_ckpt.repository import Repository, Transaction
from dist_ckpt.state.registry import REGISTRY, register
from dist_ckpt.storage.resolve import Place
from dist_ckpt.threads import Latch, in_parallel

_log = logging.getLogger("dist_ckpt")


class Writer(StorageWriter, AsyncStager):
    """Writes a checkpoint of dist_ckpt under `torch.distributed.checkpoint.save` and `async_save`.

    ```python
    import dist_ckpt
    import torch
    import torch.distributed.checkpoint as dcp

    state_dict = {"model": torch.nn.Linear(4, 1).state_dict()}
    dcp.save(state_dict, storage_writer=dist_ckpt.dcp.Writer("runs/17", step=1000))
    ```

    What the stock entry points do not have comes with it: the checkpoint exists only when every
    rank has written its share, every byte has a digest, Python values are stored as typed JSON and
    never as pickles, and a job that was replaced can no longer commit.

    A Writer takes the run over at its first save. One may serve all saves of a program,
    `checkpoint_id` then being the step. Saves of `async_save` may be in flight together: each has
    the state of its call, and they are written one after another. With the plan cache of the stock
    planner (`enable_plan_caching`) plans are made anew at each save all the same.
    """

    # Nothing is left to wait for when `stage` returned.
    _synchronize_after_execute = False

    def __init__(
        self,
        url: Place,
        *,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe the checkpoint; nothing is written or asked of other ranks yet.

        Args:
            url: the run: a path, a URL, or a `Store`; the same on every rank.
            step: under which step; a committed one is never overwritten.
            metrics: numbers by name, stored in the manifest.
            metadata: any JSON, stored in the manifest.

        Raises:
            UsageError: the place or the step is malformed.
        """
        self._step = check_step(step)
        self._metrics = dict(metrics or {})
        self._metadata = dict(metadata or {})
        self._repository = Repository(open_store(url))
        self._ownership = Ownership()
        self._types: RegisteredTypes | None = None  # from another process
        self._here = _OfThread()

    def __getstate__(self) -> dict[str, Any]:
        # To another process: what is asked for, and no connection, thread or save.
        step = self._step if self._here.step is None else self._here.step
        types = RegisteredTypes.here()
        return {**self.__dict__, "_step": step, "_types": types, "_here": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = _OfThread()
        self._ownership = self._ownership.shared()
        if self._types is not None:
            self._types.register()

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Choose the step of the next save, if `checkpoint_id` names one: a number as text.

        That is the next save of the calling thread; of another one only where none is named there.

        Raises:
            UsageError: it is a path that leads out of the run, or anything else that is no step; in
                another thread than the main one the save raises it.
        """
        self._here.refusal = None
        if checkpoint_id is None:
            return
        try:
            step = step_of(checkpoint_id, self._repository.store)
            # The run itself names no step: that of the Writer is meant.
            self._step = self._here.step = self._step if step is None else step
        except UsageError as error:
            # In the background it is told where every rank hears of it, and where the turn of this
            # save has come: one that ended before would hold up those behind it.
            if threading.current_thread() is threading.main_thread():
                raise
            self._here.refusal = error

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the state that `async_save` is given; see `AsyncStager.stage`.

        As stock does by default. The save of the copy begins when those staged before are over: a
        rank that began another one than its peers would get what is meant for that.
        """
        return turns.stage(state_dict)

    def synchronize_staging(self) -> None:
        """Return at once: `stage` has copied everything."""

    def close(self) -> None:
        """Release nothing: a Writer holds nothing open between saves."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Tell whether `checkpoint_id` names a step."""
        return names_step(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Begin; see `StorageWriter.set_up_storage_writer`.

        Raises:
            UsageError: with `use_collectives=False`, every rank would commit the step by itself.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False leaves every rank to itself, and one checkpoint of all "
                "ranks cannot come of that: leave it out"
            )
        turns.wait_for_those_before()
        self._begin()
        if self._here.refusal is not None:
            raise self._here.refusal

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Say what this rank was asked to save; see `StorageWriter.prepare_local_plan`.

        Raises:
            UsageError: a tensor cannot be stored, or the planner keeps its plan to itself.
        """
        with plain_errors():
            plan = whole_local(plan)
            described(plan)
        save = self._here.save or self._begin()
        asked = _Wish(save.step, self._repository.store.url, save.token)
        return replace(plan, storage_data=asked)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: begin the attempt; see `StorageWriter.prepare_global_plan`.

        Raises:
            UsageError: the ranks were asked to save different things.
            AlreadyExists: the step is committed.
            FencedError: another job has taken the run over.
        """
        with plain_errors():
            try:
                plans = whole_global(plans)
            finally:
                forget_global(_Wish)
            asked: list[_Wish] = [plan.storage_data for plan in plans]
            _check_wishes(asked)
            save = self._here.save
            # Rank 0 asks as well, so what it has gathered is for its own save or for another one.
            if save is None or save.token not in [each.token for each in asked]:
                raise _mixed_up()
            # Before any rank writes: what can be refused now costs no bytes.
            transaction = self._repository.begin(save.step, self._claim(save.step))
            whole = without_empty(plans)
            save.attempt = StockAttempt(transaction, whole)
            if len(plans) > 1:
                save.attempt.clean_up_when(save.over)
            return [
                replace(
                    plan,
                    storage_data=_Assigned(save.step, transaction.save_id, rank, each.token),
                )
                for rank, (plan, each) in enumerate(zip(whole, asked, strict=True))
            ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, durably; see `StorageWriter.write_data`.

        Raises:
            UsageError: a value or a tensor cannot be stored; the message has its path.
            StorageError: a file could not be stored whole.
        """
        forget(planner)
        save, self._here.save = self._here.save, None
        with plain_errors():
            # Given away here, so that it is over when stock lets go of the results, or of the
            # error; or when this thread ends or begins another one.
            if save is None or save.token != plan.storage_data.token:
                raise _mixed_up()
            self._here.writing = weakref.ref(save)
            self._here.end = turns.ThreadEnd(save.over)
            report = self._write(plan, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(_Results(report, save))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0: commit; see `StorageWriter.finish`.

        Raises:
            IntegrityError: a rank wrote other files than were planned.
            FencedError: a newer claim owns the run; nothing was committed.
            AlreadyExists: another attempt committed the step.
            StorageError: the commit did not take effect.
        """
        with plain_errors():
            reports: list[StockReport] = [result.storage_data for (result,) in results]
            save = self._here.writing() if self._here.writing is not None else None
            attempt = None if save is None else save.attempt
            if save is None or attempt is None:
                raise _mixed_up()
            if any(each.save_id != attempt.transaction.save_id for each in reports):
                raise _mixed_up()
            begun = time.perf_counter()
            try:
                file = tree_file(metadata, attempt.faces(reports))
                if file is not None:
                    tree = _put(attempt.transaction, 0, file)
                    reports[0] = msgspec.structs.replace(reports[0], tree=tree)
                attempt.commit(reports, metrics=self._metrics, metadata=self._metadata)
            finally:
                # Every rank has reported, so none writes any more.
                attempt.clean_up()
                save.over.open()
            self._announce(attempt.transaction, reports[0], time.perf_counter() - begun)
            self._tidy(attempt.transaction)

    def _begin(self) -> Save:
        """Begin a save on this thread; the one before it on this thread is over."""
        here = self._here
        here.end = None
        here.save = Save(self._step if here.step is None else here.step)
        return here.save

    def _claim(self, step: int) -> int:
        with _claiming:
            if self._ownership.claim is None:
                # Before the claim: whoever is refused has taken the run from nobody.
                self._repository.check_free(step)
                self._ownership.claim = self._repository.claim()
            return self._ownership.claim

    def _write(self, plan: SavePlan, planner: SavePlanner) -> StockReport:
        assigned = plan.storage_data
        transaction = Transaction(self._repository.store, assigned.step, assigned.save_id)
        begun = time.perf_counter()
        try:
            share = resolve_share(assigned.rank, plan, planner)
            staging = time.perf_counter() - begun
            files: list[WrittenFile] = []
            for file in file_images(assigned.rank, share):
                files.append(_put(transaction, assigned.rank, file))
                del file  # before the next one is made: memory for one is all that this takes
        except BaseException as error:
            # At once: there may be no room for another save, and none commits without this rank.
            with suppress(Exception):
                transaction.discard()
            if isinstance(error, UsageError) and self._types is not None:
                raise self._types.explain(error) from error
            raise
        writing = time.perf_counter() - begun - staging
        return StockReport(
            assigned.save_id,
            files,
            share.described_documents(),
            staging,
            writing,
            dict(share.faces),
            list(share.aside),
        )

    def _announce(
        self, transaction: Transaction, report: StockReport, commit_seconds: float
    ) -> None:
        events.emit(
            events.SaveCommitted(
                transaction.store.url,
                transaction.step,
                0,
                save_id=transaction.save_id,
                nbytes=report.nbytes,
                stall_seconds=report.stage_seconds,
                write_seconds=report.write_seconds,
                commit_seconds=commit_seconds,
            )
        )

    def _tidy(self, transaction: Transaction) -> None:
        """Remove what dead attempts left, once; a failure here never undoes the commit."""
        if self._ownership.tidied:
            return
        try:
            # Of earlier claims alone: what saves of this one write, here or in the process of
            # another copy of this Writer, nobody here knows, and they clean up after themselves.
            self._repository.collect(claim=transaction.claim - 1, in_flight=())
            self._ownership.tidied = True
        except CheckpointError as error:
            url, step = without_secrets(transaction.store.url), transaction.step
            events.emit(events.RetentionFailed(url, step, 0, error))
            _log.warning(
                "tidying %s after step %d failed, the step is committed: %s", url, step, error
            )


def _put(transaction: Transaction, rank: int, file: StagedFile) -> WrittenFile:
    """Store one file, durably, and tell the listeners of it."""
    image = file.image
    begun = time.perf_counter()
    blocks: list[bytes] = []
    keys: list[str] = []
    # Both at once, of bytes that no store can change: the disk need not wait for the digests.
    work = [
        lambda: keys.append(transaction.put_file(file.name, [image.toreadonly()])),
        lambda: blocks.append(digest_blocks(file.blocks, image)),
    ]
    in_parallel(lambda part: part(), work, threads=len(work))
    (key,) = keys
    events.emit(
        events.FileWritten(
            transaction.store.url,
            transaction.step,
            rank,
            save_id=transaction.save_id,
            key=key,
            nbytes=len(image),
            seconds=time.perf_counter() - begun,
        )
    )
    return WrittenFile(file.name, len(image), blocks[0], file.blocks)


# One save among several in flight: what belongs to it, and what its ranks send one another.


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a rank was asked to save, on its way to rank 0; `token` is that of the rank's save."""

    step: int
    url: str
    token: str


@dataclass(frozen=True, slots=True)
class _Assigned:
    """Which attempt a rank writes for, and as whom, on its way back."""

    step: int
    save_id: str
    rank: int
    token: str


class Save:
    """One save on one rank.

    Args:
        step: what it was asked to save.

    Attributes:
        token: by which it knows again what is for it.
        attempt: on rank 0, from its plans on.
        over: opened when it is.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.token = secrets.token_hex(8)
        self.attempt: StockAttempt | None = None
        self.over = Latch()
        turns.tell_when_gone(self, self.over)


class _Results(list[WriteResult]):
    """What `write_data` returns. It keeps the save, as stock keeps it until the save is over."""

    def __init__(self, report: StockReport, save: Save) -> None:
        super().__init__([WriteResult(MetadataIndex(""), report.nbytes, report)])
        self.save = save

    def __reduce__(self) -> tuple[type[list[WriteResult]], tuple[list[WriteResult]]]:
        return list, (list(self),)


class _OfThread(threading.local):
    """What a thread knows of its save.

    Attributes:
        step: the one that was named last in this thread.
        refusal: why what was named is no step.
        save: the save, until it writes.
        writing: the save, from then on.
        end: tells that it is over with this thread.
    """

    step: int | None = None
    refusal: UsageError | None = None
    save: Save | None = None
    writing: weakref.ref[Save] | None = None
    end: turns.ThreadEnd | None = None


def _check_wishes(asked: Sequence[_Wish]) -> None:
    """Raise unless all ranks were asked for the same.

    Raises:
        UsageError: the first rank that was asked for something else than rank 0.
    """
    for rank, each in enumerate(asked):
        if (each.step, each.url) != (asked[0].step, asked[0].url):
            raise UsageError(
                f"rank 0 was asked to save step {asked[0].step} to {asked[0].url} and rank {rank} "
                f"step {each.step} to {each.url}: give every rank's Writer the same arguments"
            )


def _mixed_up() -> UsageError:
    """Return the error of a save that was sent what is another one's."""
    return UsageError(
        "this save was sent what is another one's: several were under way over one process group. "
        "Leave the staging to the Writer (no async_stager), which has them take turns; or give "
        "each its process_group, or wait for the one before"
    )


# What a Writer takes along to another process: `AsyncCheckpointerType.PROCESS` saves in one.
#
# That process imports what the state is made of, and does not run the program: what the program has
# registered, and which claim it saves under, it has to be told.


_Functions = tuple[Callable[[Any], object] | None, Callable[[Any], Any] | None]


@dataclass(frozen=True, slots=True)
class RegisteredTypes:
    """The types of `register_type`, as another process can be given them.

    Attributes:
        entries: class, stored name and the functions that were given.
        left: the names of those that cannot be sent.
    """

    entries: list[tuple[type, str, _Functions]]
    left: list[str]

    @classmethod
    def here(cls) -> RegisteredTypes:
        """Return those of this process."""
        found = cls([], [])
        for each in REGISTRY.entries():
            entry = (each.type, each.name, each.given)
            try:
                # What the pipe to the other process will do: a lambda, say, has no name there.
                ForkingPickler.dumps(entry)
            except Exception:  # whatever the functions are made of: they matter only where used
                found.left.append(each.name)
            else:
                found.entries.append(entry)
        return found

    def register(self) -> None:
        """Register what this process does not know yet."""
        for kind, name, (encode, decode) in self.entries:
            if REGISTRY.by_type(kind) is None and REGISTRY.by_name(name) is None:
                register(kind, name=name, encode=encode, decode=decode)

    def explain(self, error: UsageError) -> UsageError:
        """Return `error` of a value that has no encoding, with what may be the reason here."""
        left = [name for name in self.left if REGISTRY.by_name(name) is None]
        if error.kind is not ErrorKind.UNENCODABLE or not left:
            return error
        return UsageError(
            f"{error.message}; this is the process of AsyncCheckpointerType.PROCESS, which could "
            f"not be given what is registered as {', '.join(map(repr, left))}: make encode= and "
            "decode= functions of a module, or save in a thread",
            kind=error.kind,
        )


@dataclass(slots=True, weakref_slot=True, eq=False)
class Ownership:
    """Under which claim the saves of one Writer commit; its copies in a process share it.

    Attributes:
        writer: which Writer it is of.
        claim: None before its first save.
        tidied: whether what dead attempts of earlier claims left was removed.
    """

    writer: str = field(default_factory=lambda: secrets.token_hex(8))
    claim: int | None = None
    tidied: bool = False

    def __post_init__(self) -> None:
        _known[self.writer] = self

    def shared(self) -> Ownership:
        """Return the one that the Writer and its copies in this process have in common.

        Each save in another process is of a new copy: were each to claim the run anew, they would
        take it from one another.
        """
        with _claiming:
            one = _known.get(self.writer)
            if one is None:
                one = _known[self.writer] = self
                _of_copies.append(one)
            # The program may have saved itself meanwhile: the highest claim owns the run.
            one.claim = max((each for each in (one.claim, self.claim) if each), default=None)
            one.tidied |= self.tidied
            return one


_claiming = threading.Lock()
"""Held while a claim is made, so that of several saves at once one makes it."""

_known: WeakValueDictionary[str, Ownership] = WeakValueDictionary()
# Of Writers that came from elsewhere: between two saves there is no copy that would keep them.
_of_copies: list[Ownership] = []
