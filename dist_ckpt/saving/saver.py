"""Saves, from the call to the end of the process: agree and stage at once, write behind it."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  see `_finish_first`
import inspect
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import parent_process
from multiprocessing.util import Finalize, is_exiting
from typing import Any

from dist_ckpt import events
from dist_ckpt.errors import CheckpointError, StorageError, describe
from dist_ckpt.format.names import check_step
from dist_ckpt.options import SaveOptions
from dist_ckpt.planning.describe import Describer
from dist_ckpt.planning.files import StagedFile
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.saving.across_hosts import begin_folders, run_across_hosts
from dist_ckpt.saving.agreement import Agreement, Asked, as_asked
from dist_ckpt.saving.attempt import Attempt, Commit, Housekeeping, StagedShare
from dist_ckpt.saving.handle import (
    Outcomes,
    SaveHandle,
    Tolerance,
    note_untold,
    take_untold,
    untold_number,
)
from dist_ckpt.saving.messages import RankPlan
from dist_ckpt.saving.provenance import Metrics, Provenance, SaveContext, as_numbers
from dist_ckpt.saving.snapshot import Snapshot, Stager, take_snapshot
from dist_ckpt.staging.arena import no_collection, pin_of
from dist_ckpt.state.train_state import TrainState, estimate
from dist_ckpt.threads import WriterThread, is_background, wait_for_threads

_GIVE_UP_SECONDS = 10.0


class Saver:
    """Saves the state of one job, one save in flight at a time.

    Attributes:
        outcomes: how the saves went.
        asked: how saves are asked for, by name; all ranks have to ask for them in one way.
        refused: what keeps this rank from saving anything; all ranks hear of it in each save.
    """

    def __init__(
        self,
        job: Job,
        state: TrainState,
        *,
        keep: KeepPolicy | None,
        metadata: Mapping[str, Any],
        options: SaveOptions | None = None,
        tolerance: Tolerance | None = None,
    ) -> None:
        self._job = job
        self._state = state
        self._metadata = dict(metadata)
        self._options = options = options or SaveOptions()
        tolerance = tolerance or Tolerance()
        self.outcomes = Outcomes(job.url, tolerance)
        self.refused: Exception | None = None
        self.asked = {"keep": as_asked(keep), **options.alike(), **tolerance.alike()}
        self._program = Provenance(command=True) if options.command else None
        self._planner: Agreement | None = None
        self._describer = Describer()
        limit, apart = options.memory_limit_bytes, job.ranks.node_local
        self._stager = Stager(mode=options.staging, memory_limit_bytes=limit, apart=apart)
        self._writer = WriterThread()
        self._housekeeping = Housekeeping(job, keep)
        self._pending: SaveHandle | None = None
        # The failure of a save before, of which nobody was told yet.
        self._earlier: Exception | None = None
        self._given_up: SaveHandle | None = None
        self._last = False
        end_with(self)

    def prewarm(self) -> None:
        """Begin to take the memory that the first save will need, in the background.

        Cheap, and without effect once a save was begun: then the size is known, or will be.
        """
        if self._planner is None:
            guess = estimate(
                self._state,
                world_size=self._job.ranks.world_size(),
                limit_bytes=self._options.memory_limit_bytes,
            )
            if guess.nbytes:
                self._stager.arena.prewarm(guess.nbytes, pin=pin_of(guess.devices))

    def start(
        self,
        step: int,
        metrics: Metrics,
        about: SaveContext | None = None,
        *,
        within_seconds: float = math.inf,
        failed: Exception | None = None,
    ) -> SaveHandle:
        """Begin to save, what is before it included within so long; return when all is staged.

        Args:
            step: which step the state stands after.
            metrics: what was given with it.
            about: what the manifest says besides.
            within_seconds: how long it may take.
            failed: what keeps this rank from saving; all ranks hear of it.

        Raises:
            CheckpointError: the ranks could not agree; the same on every rank.
            UsageError: the save is not this process's to make; see `Job.coordinators`.
            Exception: what the state of this rank raised, on this rank.
        """
        about = about or SaveContext(program=self._program)
        try:
            last = Deadline.after(within_seconds)
            handle = self._start(step, metrics, about, last, failed)
        except BaseException as error:
            # Every rank was told of this one: whether another one answers each finds out alone.
            alike = error if isinstance(error, StorageError) else None
            if alike and self.outcomes.not_begun(step, alike, rank=self._job.training.rank):
                return SaveHandle.not_begun(step, alike)
            if self._earlier is not None:
                error.add_note(f"besides, the save before failed: {describe(self._earlier)}")
                self._earlier = None
            raise
        if is_exiting():
            handle.wait()  # what waits at the end of the process has been called already
        return handle

    def tell_earlier(self, step: int) -> None:
        """Raise the failure of the save before `step`, which was begun all the same.

        Raises:
            Exception: that failure, on every rank, if any rank was not told of it yet.
        """
        error, self._earlier = self._earlier, None
        if error is not None:
            error.add_note(f"step {step} is being saved all the same{self.outcomes.row()}")
            raise error

    def _start(
        self,
        step: int,
        metrics: Metrics,
        about: SaveContext,
        last: Deadline,
        failed: Exception | None,
    ) -> SaveHandle:
        self._job.check_process()
        if self._planner is None:
            finish_before(self._job, besides=self)
        begun = time.perf_counter()
        # First of all, since it may have to wait until the other ranks are there.
        planner = self._planner = self._planner or Agreement(
            self._job.training,
            max_piece_bytes=self._options.max_piece_bytes,
            check_replicas=self._options.check_replicas,
        )
        end_with(self)  # again: this may be a child that was forked since
        busy = self._is_in_the_way()
        if not busy:
            self.finish_pending()
        # Only now: the time that the save before took is not taken from this one.
        deadline = min(self._job.deadline(), last, key=lambda each: each.at)
        earlier = self.outcomes.failure if self.outcomes.warns else self._earlier
        topic = self._job.topic("save", f"save of step {step}")
        with no_collection():
            # A failure goes where a snapshot would: the other ranks wait for this one in the round.
            snapshot = failed or self.refused or self._snapshot(step, metrics)
            if self._job.ranks.node_local and isinstance(snapshot, Snapshot):
                planner.hosts = begin_folders(self._job, step, topic, deadline)
            agreed = planner.agree(
                Asked(step, self._job.common_url, self.asked, busy, earlier),
                snapshot,
                self._housekeeping.begin,
                topic=topic,
                deadline=deadline,
            )
            if agreed.plan is None:
                events.emit(events.SaveSkipped(self._job.url, step, self._job.training.rank))
                return SaveHandle.skipped(step)
            self._earlier = None if self.outcomes.heard(agreed.told) else agreed.earlier
            about = replace(about, failed_saves=self.outcomes.in_a_row)
            self._housekeeping.protect(agreed.save_id)
            # Before a file is written: what is written to several places can never be loaded.
            self._job.check_same_place(topic)
            assert isinstance(snapshot, Snapshot)  # `agree` raised whatever else it was
            attempt = Attempt(
                Transaction(self._job.repository.store, step, agreed.save_id),
                self._job.coordinators.writer,
                topic=topic.phase("commit"),
                deadline=deadline,
                metrics=as_numbers(metrics),
                overdue=self._overdue,
            )
            commit = self._commit(attempt, about)
            self.outcomes.begun()
            share = self._stage(attempt, snapshot, agreed.plan)
        self._hand_on(attempt, share, commit, begun)
        return attempt.handle

    def start_last(
        self, step: int, metrics: Metrics, *, failed: Exception | None = None
    ) -> SaveHandle:
        """Begin the only save of this job; when it is over everything is released. See `start`."""
        self._last = True
        try:
            return self.start(step, metrics, failed=failed)
        except BaseException:
            if self._pending is None:  # else the writer releases everything when it has reported
                self._release()
            raise

    def look_around(self) -> None:
        """Have the next commit followed by a look for what nobody needs any more."""
        self._housekeeping.litter = True

    def note_late(self, step: int, epoch: int | None, metrics: Metrics) -> None:
        """Say of the checkpoint of `step`, once it is committed, what is known only now."""
        # After the commit on the writer's thread, and after the tidying that follows it.
        self._housekeeping.note_late(step, epoch, metrics, after=self._writer.submit)

    def drain(self) -> None:
        """Wait until the save in flight and the retention after it are over.

        Raises:
            Exception: the failure of a save of which nobody was told yet.
        """
        error = self.settle()
        if error is not None:
            raise error

    def settle(self, *, goes_on: bool = False) -> Exception | None:
        """Do as `drain`, but return the failure, so that all ranks hear of it in the next round.

        Args:
            goes_on: whether other saves may follow: what `when_failed` bears is none then.
        """
        self._job.check_process()  # what its threads are to finish, no thread of a child will
        self.finish_pending()
        error, self._earlier = self._earlier, None
        if goes_on and error is not None and self.outcomes.bears(error):
            error = None
        # A retention that hangs is left to itself in the end: nothing depends on it.
        seconds = self._job.timeout_seconds
        if self._writer.wait_idle(seconds):
            self._housekeeping.thread.wait_idle(seconds)
        return error

    def close(self) -> None:
        """Drain, then let the threads and the other ranks go; see `drain`."""
        if self._job.is_parents or (self._given_up is not None and not self._given_up.done()):
            return  # its threads are not here, or may never come back
        # An interrupt here releases nothing: the end of the process waits for the save once more.
        error = self.settle()
        self._release()
        if error is not None:
            raise error

    @property
    def in_flight(self) -> SaveHandle | None:
        """The save that is not over yet, and was not given up."""
        found = self._pending
        if found is None or found is self._given_up or found.done() or self._job.is_parents:
            return None
        return found

    @property
    def label(self) -> str:
        """The save in flight, as messages name it."""
        if self._pending is None:
            return f"a save to {self._job.url}"
        on = f" on rank {self._job.training.rank}" * (self._job.training.world_size > 1)
        return f"the save of step {self._pending.step} to {self._job.url}{on}"

    @property
    def job(self) -> Job:
        """The ranks that save, and the run."""
        return self._job

    def give_up(self) -> None:
        """Cancel the save in flight, on every rank, and wait for a moment until it is over."""
        handle = self.in_flight
        if handle is None:
            return
        self._given_up = handle  # first: nobody waits for it again, should this be interrupted
        if handle.cancel():
            handle.settle(_GIVE_UP_SECONDS)
            self._writer.wait_idle(_GIVE_UP_SECONDS)  # it takes back what it had written

    def _release(self) -> None:
        self._writer.stop()
        self._housekeeping.thread.stop()
        self._stager.release()
        self._job.leave()
        # Last: until rank 0 has left, the end of its interpreter would cut the others off.
        end_without(self)

    def _is_in_the_way(self) -> bool:
        """Whether this rank would rather skip; a save that is to be replaced is given up here."""
        pending = None if self._pending is None or self._pending.done() else self._pending
        if pending is not None and self._options.when_busy == "replace":
            pending.cancel()  # should it be committed all the same, it counts
        return pending is not None and self._options.when_busy == "skip"

    def finish_pending(self) -> None:
        """Wait until the save in flight is over; keep its failure if nobody was told of it."""
        handle = self._pending
        if handle is None:
            return
        handle.settle()
        self._stager.settle()
        self.outcomes.ended(handle, rank=self._job.training.rank)
        # Last: when an interrupt ends the waiting, the writer may still be reading the arena.
        self._pending = None
        self._earlier = handle.take_error() or self._earlier

    def _snapshot(self, step: int, metrics: Metrics) -> Snapshot | BaseException:
        # Returned, not raised: the other ranks wait in a round, and must hear of it, be it an
        # interrupt.
        try:
            check_step(step)
            as_numbers(metrics)
            return take_snapshot(
                self._state,
                world_size=self._job.training.world_size,
                describer=self._describer,
            )
        except BaseException as error:
            return error

    def _stage(self, attempt: Attempt, snapshot: Snapshot, plan: RankPlan) -> StagedShare:
        try:
            attempt.meter.enter("staging")
            documents = snapshot.documents(plan.objects, plan.versions)
            staged = self._stager.stage(
                rank=attempt.rank,
                local=snapshot.local,
                owned=plan.owned,
                documents=documents,
                write_out=lambda files: self._write_out(attempt, files),
                twin_of=plan.twin_of,
            )
            attempt.meter.staged(staged.nbytes)
            return StagedShare(staged, snapshot.describe_documents(documents), plan)
        except BaseException as error:
            # Returned even when it is an interrupt: the others wait to hear how it went here.
            return StagedShare(error)

    def _write_out(self, attempt: Attempt, files: Sequence[StagedFile]) -> None:
        """Write what must leave the arena before the rest is staged; the training waits for it."""
        failures: list[BaseException] = []

        def write() -> None:
            try:
                attempt.files.write(files)
            except BaseException as error:
                failures.append(error)

        # Not on this thread: a backend that never answers would hold up the training for ever.
        self._writer.submit(write)
        if not self._writer.wait_idle(attempt.deadline.remaining_seconds):
            error = attempt.late()
            self._abandon(attempt, error)
            raise error
        if failures:
            raise failures[0]

    def _hand_on(self, attempt: Attempt, share: StagedShare, commit: Commit, begun: float) -> None:
        """Tell the writer thread that all is staged, or why it is not."""
        share = replace(share, stall_seconds=time.perf_counter() - begun)
        try:
            attempt.tell_staged(share)
        except BaseException as error:  # an interrupt of a listener, as one while it was staged
            share = replace(share, staged=error)
        # Known before it is submitted: from then on somebody has to wait for it.
        self._pending = attempt.handle
        # Of both calls the first that comes runs it: nobody else would ever end the save.
        runs = iter([partial(self._run, attempt, share, commit)])

        def run() -> None:
            for each in runs:
                each()

        try:
            self._writer.submit(run)
        except RuntimeError as error:  # no thread is to be had: this one tells the others
            attempt.handle.take_error()
            self._run(attempt, StagedShare(error, stall_seconds=share.stall_seconds), commit)
            raise
        except BaseException:
            # An interrupt, before or after: the save goes on, and the end waits for it.
            self._writer.submit(run)
            raise
        if isinstance(share.staged, BaseException) and not isinstance(share.staged, Exception):
            # An interrupt: the other ranks are told, and this one stops. It knows why.
            attempt.handle.take_error()
            raise share.staged

    def _commit(self, attempt: Attempt, about: SaveContext) -> Commit:
        assert self._planner is not None
        deadline = attempt.deadline.for_coordinator()
        return Commit(
            transaction=attempt.transaction,
            job=self._job,
            plan=self._planner.number,
            index=self._planner.index,
            inside=lambda: attempt.files.inside,
            # In the order of this rank; others may have parts that it does not.
            parts=list(dict.fromkeys([*self._state.parts, *self._planner.parts])),
            metrics=attempt.metrics,
            metadata={**self._metadata, **about.metadata},
            parent_step=self._job.restored_step,
            confirm=lambda: attempt.stop.confirm(deadline),
            about=about,
        )

    def _run(self, attempt: Attempt, share: StagedShare, commit: Commit) -> None:
        """The background job: write and commit, then have it tidied up."""
        if self._job.hosts is None:
            attempt.run(share, commit.decide)
        else:
            run_across_hosts(self._job, attempt, share, commit)
        self.outcomes.ended(attempt.handle, rank=attempt.rank)
        if attempt.handle.outcome == "committed":
            self._housekeeping.tidy(attempt.transaction.step, at_once=self._last)
        else:
            self._housekeeping.litter = True
        if self._last:
            self._release()

    def _overdue(self, attempt: Attempt) -> CheckpointError | None:
        """Near the deadline: find out how the save ended although the writer has not come back."""
        error = self._job.training.verdict(attempt.topic)
        if error is None and attempt.deadline.passed:
            error = attempt.late()
        if error is None or self._writer.wait_idle(0.2):
            return None
        self._abandon(attempt, error)
        return error

    def _abandon(self, attempt: Attempt, error: CheckpointError) -> None:
        # The thread may hang in the backend for ever: it keeps its arena, and the next save gets a
        # thread and an arena of its own.
        attempt.stop.give_up(error)
        self._writer.abandon()
        self._stager.abandon()
        self._housekeeping.litter = True


# The end of the process, in one order: saves, failures that nobody heard of, connections.
#
# 1. Saves in flight are finished, before Python lets its pools of threads go: a file system that
#    resolves a name in one could reach no server any more.
# 2. When `multiprocessing` ends the process, the saves that were begun since, by threads that
#    Python waits for, are finished too, and all is let go.
# 3. A failure that nobody waited for is told on standard error, and the exit status is not 0.
# 4. Then, and not before, storage closes its connections (`dist_ckpt.storage.s3_client`).
#
# A forked child has none of its parent's saves: it neither waits for them nor ends them. It has all
# of this for its own.


_PATIENCE_SECONDS = 2.0
"""How long the end waits without a word: most saves are over by then."""

# What a signal raises in the main thread, by Python's handler or by one as programs have it.
_INSISTENCE = (KeyboardInterrupt, SystemExit)


_open_savers: weakref.WeakSet[Saver] = weakref.WeakSet()
_registered_in: int | None = None

os.register_at_fork(after_in_child=_open_savers.clear)


def end_with(saver: Saver) -> None:
    """Let this process not end before the save that `saver` begins now is over."""
    global _registered_in
    _open_savers.add(saver)
    if _registered_in != os.getpid():
        _registered_in = os.getpid()
        # Not atexit, which the processes of multiprocessing, and so torch's spawn, never come to.
        Finalize(None, close_all, exitpriority=10)


def end_without(saver: Saver) -> None:
    """Forget `saver`: it was closed."""
    _open_savers.discard(saver)


def finish_before(job: Job, *, besides: Saver | None = None) -> None:
    """Wait for what others in this process save to a run, before `job` takes it over or loads.

    A claim that is taken now would end such a save, and nobody meant that: a cell of a notebook
    that is run twice, or `async_save` in a loop, goes on with what this very process does. And a
    load means what was saved before it, in the background or not. The failure of a save is told to
    whoever waits for it, or at the end. One of other ranks is not waited for: they may be gone, and
    be the reason to begin anew without them.

    Args:
        job: what begins.
        besides: who asks.
    """
    if is_background():
        return  # called by such a save, as a listener is: it would wait for itself
    for saver in list(_open_savers):
        alike = saver.job.url == job.url and saver.job.ranks == job.ranks
        if alike and saver is not besides:
            _wait_for(saver)


def leave(saver: Saver, close: Callable[[], None], error: BaseException | None) -> None:
    """Call `close` at the end of a `with` block, which `error` ends if it is one.

    Raises:
        Exception: what `close` raised; where `error` ends the block that is a note to it.
    """
    try:
        if error is not None:
            _say_waiting(saver)  # in here: who reads it may interrupt before the waiting begins
        close()
    except KeyboardInterrupt:
        if isinstance(error, KeyboardInterrupt):
            saver.give_up()  # asked once more: nobody waits for the save any longer
        raise
    except Exception as failure:
        if error is None:
            raise
        # The exception that ended the loop is the news; the failed save is a note to it.
        error.add_note(f"besides, the save in flight failed: {describe(failure)}")


def _say_waiting(saver: Saver) -> None:
    """Say on standard error what is waited for, if anything is, and how to give that up."""
    handle = saver.in_flight
    if handle is not None:
        _print(f"{_waiting(saver, handle)}; interrupt it to give that up")


def _waiting(saver: Saver, handle: SaveHandle) -> str:
    now = handle.progress
    done = f", {now.nbytes_done:,} of {now.nbytes_total:,} bytes" if now.nbytes_total else ""
    return f"waiting for {saver.label} ({now.phase}{done})"


def _print(text: str) -> None:
    # Not by the log, which may go anywhere: this is for the person at the terminal.
    with suppress(Exception):  # there may be no such stream, or nobody at its other end
        sys.stderr.write(f"dist_ckpt: {text}\n")
        sys.stderr.flush()


def _finish_all() -> None:
    """Wait for the saves in flight; who interrupts that twice, whenever, has them given up."""
    interrupted = isinstance(_last_error(), KeyboardInterrupt)
    for saver in list(_open_savers):
        said = False
        while saver.in_flight is not None:
            try:
                if interrupted and not said:
                    said = True
                    _say_waiting(saver)
                _wait_for(saver)
            except _INSISTENCE:
                if interrupted:
                    # Asked to end, and asked again: nobody waits for a checkpoint any more. Given
                    # up on every rank and not just left, so that none waits for this one's report.
                    with suppress(*_INSISTENCE):
                        saver.give_up()
                    break
                interrupted = True


def _wait_for(saver: Saver) -> None:
    handle = saver.in_flight
    if handle is not None and not handle.settle(_PATIENCE_SECONDS):
        _print(_waiting(saver, handle))
        handle.settle()


def close_all() -> None:
    """Finish every save, close every saver and tell what nobody heard of, as the end does."""
    _finish_all()
    for saver in list(_open_savers):
        label = saver.label
        try:
            saver.close()
        except _INSISTENCE:
            break  # what is left of it are threads and memory, which go anyway
        except Exception as error:
            text = f"{label} failed, and nobody waited for it: {describe(error)}"
            note_untold(untold_number(), text)
    # The last thing that a save lets go of, and not only its outcome.
    wait_for_threads(_PATIENCE_SECONDS)
    _tell_untold()


def _finish_first() -> None:
    """Do the first step, as early as Python lets anything be done at its end.

    Registered after the pools of threads have registered their own end, so called before that.
    """
    _finish_all()
    if parent_process() is not None:
        # Its exit status is made up next, before what multiprocessing would call afterwards.
        _tell_untold()


def _tell_untold() -> None:
    """Tell what nobody was told, and let the process fail."""
    for text in take_untold():
        _print(text)
        if not isinstance(sys.stderr, _FailingStream):
            sys.stderr = _FailingStream(sys.stderr)


class _FailingStream:
    """Standard error, but for the last flush of the process, which fails.

    That is the one thing after which both Python (with 120) and `multiprocessing` (with 1) end with
    an exit status other than 0 when everything else is over: an exception at exit is only printed,
    and to end the process here would cut off whatever is still to be called at its end.
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        """Flush, and fail if this is the last time."""
        if self._stream is not None:
            self._stream.flush()
        frame = inspect.currentframe()
        caller = frame.f_back.f_code.co_name if frame is not None and frame.f_back else ""
        if sys.is_finalizing() or caller == "_flush_std_streams":
            raise SystemExit(1)


def _last_error() -> BaseException | None:
    """Return what ended the program, where that was an exception that nobody caught."""
    return getattr(sys, "last_value", None)


# Not public, but what the pools of threads themselves use; without it, or where the process ends
# already, the second step does what this one would have done.
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_finish_first)  # type: ignore[attr-defined]  # noqa: SLF001
