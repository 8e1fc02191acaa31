"""A save as its writer carries it out: a rank's files, the commit, and the tidying up after it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dist_ckpt import events
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    IntegrityError,
    StorageError,
    UsageError,
    as_ours,
    describe,
)
from dist_ckpt.format.files import BLOCK_BYTES, digest_blocks
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, longest
from dist_ckpt.format.names import segment_name
from dist_ckpt.format.segments import Segment, SegmentNote, Spent, encode_root, encode_segment
from dist_ckpt.planning.files import (
    Document,
    IndexPlan,
    StagedFile,
    WrittenFile,
    describe_share,
    extra_name,
    versions,
)
from dist_ckpt.ranks.coordinator import LOST
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Decide, Topic, pack, unpack
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.history import EpochNote, History, put_epoch_note
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.saving.handle import CancelToken, ProgressMeter, SaveHandle, SaveHooks, SaveProgress
from dist_ckpt.saving.messages import RankPlan, Report
from dist_ckpt.saving.provenance import Metrics, SaveContext, as_numbers, tell_differing
from dist_ckpt.saving.snapshot import Staged
from dist_ckpt.threads import WriterThread, in_parallel

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class StagedShare:
    """What this rank gives to a save.

    Attributes:
        staged: the images of its files, or the error that kept them from being made.
        documents: the encoded values among its files.
        plan: what this rank was told to write; None where it is not known.
        stall_seconds: how long the training step waited for it.
    """

    staged: Staged | BaseException
    documents: Sequence[Document] = ()
    plan: RankPlan | None = None
    stall_seconds: float = 0.0

    @property
    def twin_of(self) -> int | None:
        """See `RankPlan.twin_of`."""
        return None if self.plan is None else self.plan.twin_of


class Attempt:
    """What the writer thread needs of a save, and nothing of the live state.

    Args:
        transaction: where the files go.
        coordinator: of the writer thread.
        topic: the round in which ranks report.
        deadline: when the save is over in any case.
        metrics: what this rank was given; those of rank 0 are stored.
        overdue: see `SaveHooks`.

    Attributes:
        stop: what ends it before its time.
        meter: how far this rank is.
        files: writes the files of this rank.
        handle: what the caller holds.
        topics: of all rounds that may end without a commit.
    """

    def __init__(
        self,
        transaction: Transaction,
        coordinator: Coordinator,
        *,
        topic: Topic,
        deadline: Deadline,
        metrics: Mapping[str, float],
        overdue: Callable[[Attempt], CheckpointError | None],
    ) -> None:
        self.transaction = transaction
        self.topic, self.topics = topic, [topic]
        self.deadline = deadline
        self.metrics = metrics
        self.rank = coordinator.rank
        self.stop = CancelToken(coordinator, topic)
        self.meter = ProgressMeter(self._tell)
        self.files = FileWriter(transaction, rank=self.rank, stop=self.stop, meter=self.meter)
        hooks = SaveHooks(
            overdue=lambda: overdue(self),
            announce=self._announce,
            cancel=self.stop.cancel,
            progress=lambda: self.meter.now,
        )
        self.handle = SaveHandle(transaction.step, transaction.save_id, deadline, hooks)
        self._coordinator = coordinator
        self._stall_seconds = 0.0
        self._commit_seconds = 0.0

    def late(self) -> CoordinationError:
        """Return the error of a save whose writer on this rank does not come back."""
        return CoordinationError(
            f"{self.topic.label}: the writer of rank {self.rank} did not finish within "
            f"{self.deadline.span_seconds:g} s",
            kind=ErrorKind.TIMEOUT,
            ranks={self.rank: "its writer did not finish"},
        )

    def tell_staged(self, share: StagedShare) -> None:
        """Tell the listeners of this process that the training step goes on."""
        events.emit(
            events.SaveStaged(
                self.transaction.store.url,
                self.transaction.step,
                self.rank,
                save_id=self.transaction.save_id,
                nbytes=0 if isinstance(share.staged, BaseException) else share.staged.nbytes,
                stall_seconds=share.stall_seconds,
            )
        )

    def run(
        self, share: StagedShare, decide: Decide, then: Callable[[], None] = lambda: None
    ) -> None:
        """Write, report, and learn the outcome. Ends the handle; never raises.

        Args:
            share: what this rank gives.
            decide: what rank 0 does with the reports.
            then: what all ranks do once that is decided, if the save is not over yet.
        """
        error: Exception | None = None
        message = self._report(share)
        self.meter.enter("committing")
        begun = time.perf_counter()
        try:
            self._coordinator.round(self.topic, message, decide, deadline=self.deadline)
            then()
        except Exception as failure:
            error = failure
        except BaseException as failure:  # a thread has nobody above it: the handle must hear of it
            # Not as it is: what ends a thread would end the program of whoever waits for it.
            error = StorageError(
                f"{self.topic.label}: the writer of rank {self.rank} was ended by "
                f"{describe(failure)}",
                ranks={self.rank: describe(failure)},
            )
            error.__cause__ = failure
        self._commit_seconds = time.perf_counter() - begun
        self.meter.enter("done")
        self.handle.finish(error)
        if error is not None and self._is_void():
            # At once, not after the next commit: there may be no room for another one. What cannot
            # be removed now is garbage by then.
            with suppress(Exception):
                self.transaction.discard()

    def _is_void(self) -> bool:
        """Whether nothing can let this checkpoint come into being any more.

        Only where rank 0 said so: of any other failure it is not known whether it still commits.
        """
        if self.rank == 0:
            return not self.transaction.may_exist
        for topic in self.topics:
            said = self._coordinator.verdict(topic)
            if said is not None:
                return said.kind is not ErrorKind.IN_DOUBT and said.ranks != LOST
        return False

    def _report(self, share: StagedShare) -> bytes | BaseException:
        """Write this rank's files; return the report, or what went wrong for others to hear."""
        if isinstance(share.staged, BaseException):
            return share.staged
        try:
            share.staged.wait()
            self.meter.enter("writing")
            self.files.write(share.staged.files)
            self._stall_seconds = share.stall_seconds
            assert share.plan is not None  # as there is something staged
            # Files that are written on several hosts are described by one rank.
            tensors = share.twin_of is None
            segment = describe_share(
                self.rank,
                numbers=share.plan.numbers,
                owned=share.plan.owned if tensors else (),
                plans=share.staged.plans if tensors else (),
                files=[f for f in self.files.written if tensors or f.name == extra_name(self.rank)],
                documents=share.documents,
            )
            return pack(
                Report(
                    None if segment is None else self.files.describe(segment),
                    share.plan.number,
                    share.stall_seconds,
                    self.files.seconds,
                    host=socket.gethostname(),
                    metrics=dict(self.metrics),
                )
            )
        except BaseException as error:  # whatever it is, the others are waiting to hear of it
            return error

    def _announce(self, error: Exception | None) -> None:
        """Tell the listeners of this process how the save ended."""
        where = (self.transaction.store.url, self.transaction.step, self.rank)
        save_id = self.transaction.save_id
        if error is None:
            events.emit(
                events.SaveCommitted(
                    *where,
                    save_id=save_id,
                    nbytes=self.files.nbytes,
                    stall_seconds=self._stall_seconds,
                    write_seconds=self.files.seconds,
                    commit_seconds=self._commit_seconds,
                )
            )
        elif self.handle.cancelled:
            events.emit(events.SaveCancelled(*where, save_id=save_id))
        else:
            what = f"the save of step {self.transaction.step} to {where[0]} failed"
            self.handle.tell_at_exit(f"{what}, and nobody waited for it: {describe(error)}")
            events.emit(events.SaveFailed(*where, as_ours(error)))

    def _tell(self, progress: SaveProgress) -> None:
        events.emit(
            events.SaveProgressed(
                self.transaction.store.url,
                self.transaction.step,
                self.rank,
                save_id=self.transaction.save_id,
                phase=progress.phase,
                nbytes_done=progress.nbytes_done,
                nbytes_total=progress.nbytes_total,
            )
        )


# From the arena to the store: bytes, several files side by side, and their digests meanwhile.


FILES_AT_ONCE = 2
"""How many files of one rank are put at once.

While one file is begun or made durable the other keeps the disk or the network busy. More would
gain nothing: each put has threads of its own.
"""

# So much is digested between two looks whether the save is still wanted.
_DIGESTED_BYTES = 8 * BLOCK_BYTES


class FileWriter:
    """Writes the files of one rank for one attempt.

    Args:
        transaction: where they go.
        rank: this rank.
        stop: asked before every piece.
        meter: counts the bytes.

    Attributes:
        written: the files that are durable and digested, in the order in which they were given.
        nbytes: how many bytes they have.
        seconds: how long it took to write and digest them.
        inside: on rank 0, its segment, which goes with the root.
    """

    def __init__(
        self, transaction: Transaction, *, rank: int, stop: CancelToken, meter: ProgressMeter
    ) -> None:
        self._transaction = transaction
        self._rank = rank
        self._stop = stop
        self._meter = meter
        self.written: list[WrittenFile] = []
        self.seconds = 0.0
        self.inside = b""

    @property
    def nbytes(self) -> int:
        """How many bytes are durable."""
        return sum(file.nbytes for file in self.written)

    def write(self, files: Sequence[StagedFile]) -> None:
        """Store and digest `files`; each is durable when this returns.

        Both at once: what they read nobody can change, so a digest is that of the staged bytes
        whether these have left already or not, and the disk need not wait for it.

        Args:
            files: their images stay as they are until this returns.

        Raises:
            CheckpointError: the first failure of a put, or why the save is to stop.
        """
        begun = time.perf_counter()
        failures: list[BaseException] = []
        digests: list[bytes] = []

        def put(file: StagedFile) -> None:
            try:
                self._put(file)
            except BaseException as error:
                failures.append(error)
                # The others are not worth their time any more, and their errors not worth telling.
                self._stop.fail(error)
                raise

        def put_all() -> None:
            in_parallel(put, files, threads=FILES_AT_ONCE)

        def digest_all() -> None:
            digests.extend(self._digest(file) for file in files)

        try:
            # In this order, should there be no second thread to be had.
            in_parallel(lambda work: work(), [put_all, digest_all], threads=2)
        except BaseException:
            if not failures:  # a digest was stopped
                raise
        finally:
            self.seconds += time.perf_counter() - begun
        if failures:
            raise failures[0]  # of several the first, and with the cause that it has
        for file, blocks in zip(files, digests, strict=True):
            written = WrittenFile(file.name, len(file.image), blocks, file.blocks)
            self.written.append(written)

    def describe(self, segment: Segment) -> SegmentNote:
        """Store what describes the files that were written; return what the root says of it.

        That of rank 0 is not stored here but goes with the root, which rank 0 writes itself.

        Raises:
            CheckpointError: the failure of the put, or why the save is to stop.
        """
        begun = time.perf_counter()
        self._stop.check()
        data = encode_segment(segment)
        if self._rank:
            self._transaction.put_file(segment_name(self._rank), [data])
        else:
            self.inside = data
        self.seconds += time.perf_counter() - begun
        return segment.noted(data, inside=False)

    def _put(self, file: StagedFile) -> None:
        self._stop.check()
        begun = time.perf_counter()
        # Read-only, so that no store can change what is being digested.
        image = file.image.toreadonly()
        count = self._meter.file(len(image))

        def watch(piece_bytes: int) -> None:
            self._stop.check()
            count(piece_bytes)

        key = self._transaction.put_file(file.name, [image], watch=watch)
        # From here on the file is durable: a report never speaks of one that is not.
        events.emit(
            events.FileWritten(
                self._transaction.store.url,
                self._transaction.step,
                self._rank,
                save_id=self._transaction.save_id,
                key=key,
                nbytes=len(image),
                seconds=time.perf_counter() - begun,
            )
        )

    def _digest(self, file: StagedFile) -> bytes:
        """Return the joined digests of the blocks of a file."""
        digests = []
        start = 0
        for lengths in _turns(file.blocks):
            self._stop.check()
            stop = start + sum(lengths)
            digests.append(digest_blocks(lengths, file.image[start:stop]))
            start = stop
            # A digest holds the interpreter lock: a training step that waits for it goes first.
            time.sleep(0)
        return b"".join(digests)


def _turns(blocks: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut blocks, given by their lengths, into runs of `_DIGESTED_BYTES` or one block at least."""
    first, nbytes = 0, 0
    for number, length in enumerate(blocks):
        if nbytes and nbytes + length > _DIGESTED_BYTES:
            yield blocks[first:number]
            first, nbytes = number, 0
        nbytes += length
    if nbytes:
        yield blocks[first:]


# The commit by rank 0 when every rank has reported.
#
# Rank 0 does it; where each host has a folder of its own, the rank that leads the host.


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything rank 0 knows of an attempt before the reports arrive.

    `plan` is the number of the plan, `inside` returns the segment of rank 0. `confirm` raises if
    the save may not be committed any more: other ranks may have given up.
    """

    transaction: Transaction
    job: Job
    plan: int
    index: IndexPlan
    inside: Callable[[], bytes]
    parts: Sequence[str]
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    parent_step: int | None
    confirm: Callable[[], None]
    about: SaveContext = field(default_factory=SaveContext)

    def decide(self, messages: Sequence[bytes]) -> bytes:
        """Commit, given the report of each rank; the answer to all ranks is empty.

        Raises:
            IntegrityError: a rank wrote by another plan.
            FencedError: a newer claim owns the run.
            AlreadyExists: another attempt committed the step.
            CoordinationError: the save was cancelled, or it is too late.
            StorageError: the commit did not take effect.
        """
        root, draft = self.describe(messages)
        self.transaction.commit(
            root,
            draft,
            confirm=self.confirm,
            replaces=self.job.passed_over.manifest(self.transaction.step),
        )
        self.job.committed(self.transaction.step)
        return b""

    def describe(self, messages: Sequence[bytes]) -> tuple[bytes, Manifest]:
        """Check the report of each rank; return the encoded root, and the draft of the manifest.

        Raises:
            IntegrityError: a rank wrote by another plan.
            CoordinationError: the save was cancelled, or it is too late.
        """
        reports = [unpack(data, Report) for data in messages]
        self._check(reports)
        where = (self.transaction.store.url, self.transaction.step)
        tell_differing(*where, reports, self.about.told)
        # The first of two times: `Transaction.commit` asks once more, right before the manifest.
        self.confirm()
        root = encode_root(
            self.index.structure,
            self._segments(reports),
            [Spent(report.stage_seconds, report.write_seconds) for report in reports],
        )
        return root, self._draft(reports)

    def _segments(self, reports: Sequence[Report]) -> list[SegmentNote]:
        found = [report.segment for report in reports if report.segment is not None]
        if found and not found[0].rank:
            found[0] = msgspec.structs.replace(found[0], inside=self.inside())
        return found

    def _check(self, reports: Sequence[Report]) -> None:
        for rank, report in enumerate(reports):
            if report.plan != self.plan:
                why = f"it wrote by plan {report.plan}, not by plan {self.plan}"
                raise IntegrityError(
                    f"rank {rank} wrote other boxes than were planned: {why}",
                    kind=ErrorKind.COVERAGE,
                    ranks={rank: why},
                )

    def _draft(self, reports: Sequence[Report]) -> Manifest:
        transaction = self.transaction
        sizes = [[nbytes for _, nbytes in _files(report)] for report in reports]
        return Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(reports),
            versions=versions(),
            parts=list(self.parts),
            files=FilesTotal.of(nbytes for mine in sizes for nbytes in mine),
            metrics=dict(self.metrics),
            metadata=dict(self.metadata),
            timings=longest(
                [
                    RankTimings(
                        stage_seconds=report.stage_seconds,
                        write_seconds=report.write_seconds,
                        nbytes=sum(mine),
                    )
                    for report, mine in zip(reports, sizes, strict=True)
                ]
            ),
            parent_step=self.parent_step,
            epoch=self.about.epoch,
            origin=self.about.origin([report.host for report in reports]),
        )


def _files(report: Report) -> Sequence[tuple[str, int]]:
    return () if report.segment is None else report.segment.files


# What is done after a commit, once for a folder: retention and garbage, beside later saves.


class Housekeeping:
    """Keeps what a policy keeps and collects garbage, on the rank that leads its folder alone.

    It is no part of a save: none waits for it to begin.

    Attributes:
        litter: whether files of dead attempts may lie around: at the start, after a failed save.
        thread: where it works, beside later saves.
    """

    def __init__(self, job: Job, policy: KeepPolicy | None) -> None:
        """Remember what to keep; None is everything."""
        self._job = job
        self._policy = policy
        self._history = History(job.repository.store)
        self.thread = WriterThread("dist_ckpt-tidy")
        # Looked at while garbage is collected, so it must always hold what is being written.
        self._in_flight: set[str] = set()
        self.litter = True

    def begin(self, step: int) -> str:
        """Open an attempt whose files are no garbage; return its save_id. See `Job.begin`."""
        save_id = self._job.begin(step)
        self.protect(save_id)
        return save_id

    def protect(self, save_id: str) -> None:
        """Take the files of an attempt for no garbage, and those of the one before from now on."""
        # Before the first file of it can be listed, and before the one before is let go.
        before = self._in_flight - {save_id}
        self._in_flight.add(save_id)
        self._in_flight -= before

    def tidy(self, step: int, *, at_once: bool = False) -> None:
        """Tidy up after the commit of `step`, in the background if not at once."""
        if self._job.leads and at_once:
            self.run(step)
        elif self._job.leads:
            self.thread.submit(lambda: self.run(step))

    def run(self, step: int) -> None:
        """Tidy up after the commit of `step`. A failure here never undoes the commit."""
        repository, url = self._job.repository, self._job.url
        try:
            self._retain(step)
            if self.litter:
                # Cleared first: what a save leaves behind meanwhile is for the next time.
                self.litter = False
                claim = self._job.claim()
                for gone in repository.collect_hidden(claim=claim):
                    events.emit(events.CheckpointDeleted(url, gone, 0, "given up by going back"))
                repository.collect(claim=claim, in_flight=self._in_flight)
        except Exception as error:  # a policy of the user may raise anything
            self.litter = True
            failure = as_ours(error)
            events.emit(events.RetentionFailed(url, step, 0, failure))
            _log.warning(
                "tidying %s after step %d failed, the step is committed: %s", url, step, failure
            )

    def note_late(
        self,
        step: int,
        epoch: int | None,
        metrics: Metrics,
        *,
        after: Callable[[Callable[[], None]], None],
    ) -> None:
        """Have said of `step`, once it is committed, what is known only now.

        Args:
            step: which checkpoint.
            epoch: which epoch ended with it.
            metrics: what was given with that.
            after: runs a job when the saves before are over.
        """
        if not self._job.leads:
            return
        try:
            note = EpochNote(epoch, as_numbers(metrics))
        except UsageError as error:
            # Not raised: the other ranks have nothing to convert, and would go on alone.
            self.tell_failed(step, error)
            return
        after(lambda: self.thread.submit(lambda: self.note_epoch(step, note)))

    def note_epoch(self, step: int, note: EpochNote) -> None:
        """Say of the committed `step` what is known only now, then delete what need not be kept.

        A failure is told by an event and the log, not raised: the checkpoint is as good as before.
        """
        store = self._job.repository.store
        try:
            record = self._history.of(step)
            # No record: its save failed, and that is told elsewhere.
            if record is not None and not record.knows(note):
                put_epoch_note(store, step, record.save_id, note)
                self._retain(step)
        except Exception as error:  # a policy of the user may raise anything
            self.tell_failed(step, error)

    def tell_failed(self, step: int, error: Exception) -> None:
        """Say that something about a committed checkpoint could not be noted."""
        failure = as_ours(error)
        events.emit(events.RetentionFailed(self._job.url, step, 0, failure))
        _log.warning("noting metrics of step %d in %s failed: %s", step, self._job.url, failure)

    def _retain(self, step: int) -> None:
        """Delete what need not be kept, now that `step` is committed.

        Raises:
            CheckpointError: a listing or a deletion failed, or a newer job owns the run.
        """
        # It may be a step that was deleted by hand, or passed over, and is another one now.
        self._history.forget(step)
        if self._policy is None:
            return
        origin = self._job.restored_step
        gone = self._job.repository.retain(
            self._policy,
            claim=self._job.claim(),
            # By no policy the one that this job was restored from (commit-v1, section 6).
            protected={step} if origin is None else {step, origin},
            damaged=self._job.passed_over.steps,
            history=self._history,
        )
        for old, reason in gone.items():
            events.emit(events.CheckpointDeleted(self._job.url, old, 0, reason))
