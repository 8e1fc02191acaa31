"""The sign of life that rank 0 gives in the background, beside saves and steps."""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dist_ckpt.errors import CheckpointError, describe
from dist_ckpt.format.names import parse_save_id
from dist_ckpt.loading.loader import LoadReport
from dist_ckpt.ranks.job import Job
from dist_ckpt.repository import status
from dist_ckpt.repository.status import JobStatus, Phase
from dist_ckpt.saving.handle import Outcomes, SaveHandle
from dist_ckpt.threads import Latch, start

# How long the end of a training waits for its last word, which nobody needs for certain.
_LAST_SECONDS = 5.0
# So many starts in vain are no accident any more.
_MANY_STARTS = 2
# Between two looks whether the run is taken over: who comes next is to see a sign of life at once.
_FIRST_NAP_SECONDS = 0.01
_LONGEST_NAP_SECONDS = 0.2

_log = logging.getLogger("dist_ckpt")


@dataclass(slots=True)
class Pulse:
    """What there is to say; the training sets it, and the thread looks at it.

    Attributes:
        phase: what the training does, saves apart.
        step: the step told last.
        commit: the newest step that was restored or committed.
        save: the save that was begun last.
        starts_in_vain: how many starts before this one committed nothing.
        over: opened when nothing more is to be said but the last word.
    """

    phase: Phase = "restoring"
    step: int | None = None
    commit: int | None = None
    save: SaveHandle | None = None
    starts_in_vain: int = 0
    over: Latch = field(default_factory=Latch)

    def tell(self, step: int) -> None:
        """Take note that the state stands after `step`."""
        self.phase, self.step = "training", step

    def begun(self, save: SaveHandle) -> None:
        """Take note of a save, when all is known of the one before."""
        self._note(self.save)
        self.save = save

    def now(self) -> Phase:
        """Return what the job does, and take note of a commit."""
        save = self.save
        self._note(save)
        return self.phase if save is None or save.done() else "saving"

    def _note(self, save: SaveHandle | None) -> None:
        if save is not None and save.outcome == "committed":
            self.commit = save.step


class Heartbeat:
    """Says every few seconds that this job is alive. A failure of that is said once, and no more.

    Attributes:
        pulse: what there is to say.
    """

    def __init__(
        self, job: Job, outcomes: Outcomes, *, every_seconds: float | None, at_once: bool
    ) -> None:
        """Say nothing yet.

        Args:
            job: whose sign of life it is.
            outcomes: of its saves.
            every_seconds: how often; None for never.
            at_once: whether a first word is said as soon as the run is taken over, and a last one
                in any case. Else a job that is over before the first interval says nothing, unless
                it ended well without a commit: it is not to be taken for one that failed.
        """
        self._job = job
        self._outcomes = outcomes
        self._every_seconds = every_seconds
        self._at_once = at_once
        self._written: Latch | None = None
        self.pulse = Pulse()

    def begin(self) -> None:
        """Begin on a rank that may claim a folder, unless it has begun, or is never to."""
        if self._every_seconds is None or self._written is not None:
            return
        self._written = Latch()
        # The thread knows the job and the pulse alone, so it ends with an owner that is forgotten.
        weakref.finalize(self, self.pulse.over.open).atexit = False
        beat = _Beat(self._job, self._outcomes, self.pulse, every_seconds=self._every_seconds)
        args = (beat, self._written, self._at_once)
        start(threading.Thread(target=_run, args=args, name="dist_ckpt-status", daemon=True))

    def restored(self, report: LoadReport | None, *, looks_back: bool) -> None:
        """Take note of what of the run training goes on from, None for the beginning.

        Args:
            report: what was restored.
            looks_back: whether this rank counts the starts that were in vain.
        """
        self.pulse.phase = "training"
        self.pulse.commit = None if report is None else report.step
        if looks_back:
            self.pulse.starts_in_vain = look_back(self._job, report)

    def end(self, phase: Phase) -> None:
        """Say as the last word how the job ended, and wait for that a little."""
        self.pulse.phase = phase
        self.pulse.over.open()
        if self._written is not None and not self._job.is_parents:
            self._written.wait(_LAST_SECONDS)


def _run(beat: _Beat, written: Latch, at_once: object) -> None:
    try:
        beat.run(at_once=bool(at_once))
    finally:
        written.open()


class _Beat:
    """What the thread does."""

    def __init__(self, job: Job, outcomes: Outcomes, pulse: Pulse, *, every_seconds: float) -> None:
        self._job = job
        self._outcomes = outcomes
        self._pulse = pulse
        self._every_seconds = every_seconds
        self._count = 0
        self._failed = False

    def run(self, *, at_once: bool) -> None:
        """Say it again and again, and how it ended as the last word."""
        over = self._pulse.over
        if at_once:
            nap = _FIRST_NAP_SECONDS
            while not self._claims_are_taken() and not over.wait(nap):
                nap = min(2 * nap, _LONGEST_NAP_SECONDS, self._every_seconds)
            self._say()
        while not over.wait(self._every_seconds):
            self._say()
        in_vain = self._pulse.phase == "ended" and not self._job.has_committed
        if self._count or in_vain:
            self._say()

    def _claims_are_taken(self) -> bool:
        # Of several hosts those that lead none never have one.
        return self._job.claimed is not None or self._job.owns_folders

    def _say(self) -> None:
        claim = self._job.claimed
        if claim is None:
            return
        try:
            status.put_status(self._job.repository.store, self._status(claim))
            self._failed = False
        except Exception as error:  # a store of the user may raise anything
            if not self._failed:
                _tell_failed(self._job.url, error)
            self._failed = True
        self._count += 1

    def _status(self, claim: int) -> JobStatus:
        pulse = self._pulse
        phase = pulse.now()
        return JobStatus(
            claim=claim,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=self._job.training.world_size,
            phase=phase,
            step=pulse.step,
            commit=pulse.commit,
            lag_steps=None if pulse.step is None else max(0, pulse.step - (pulse.commit or 0)),
            failed_saves=self._outcomes.in_a_row,
            starts_in_vain=pulse.starts_in_vain,
            heartbeat=datetime.now(UTC).isoformat(timespec="seconds"),
            beat=self._count,
            every_seconds=self._every_seconds,
        )


def _tell_failed(url: str, error: Exception) -> None:
    _log.warning(
        "the status of the job on %s cannot be written or read, which is no matter for the "
        "training: %s",
        url,
        describe(error),
    )


def look_back(job: Job, restored: LoadReport | None) -> int:
    """Rank 0: return how many starts before this one committed nothing; say it if they are many.

    Args:
        job: which has claimed the run.
        restored: what of the run it goes on from, None for the beginning.
    """
    before = 0 if restored is None else parse_save_id(restored.save_id) or 0
    # Nothing is asked of storage where a few starts at most could have been in vain.
    if job.claimed is None or job.claimed - before <= _MANY_STARTS:
        return 0
    store = job.repository.store
    try:
        count = status.starts_in_vain(store, job.claimed, job.repository.latest())
    except CheckpointError as error:
        _tell_failed(job.url, error)
        return 0
    if count >= _MANY_STARTS:
        _log.warning(
            "%d starts before this one on %s, one after the other, ended without a checkpoint, and "
            "each began at %s: look in their logs for what ends them before the first save, or "
            "save sooner",
            count,
            job.url,
            "the beginning" if restored is None else f"step {restored.step}",
        )
    return count
