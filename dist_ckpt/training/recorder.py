"""From what a training tells to the saves of it, and to the sign that it is alive.

`Course` is the memory of that: what was told, what of it is stored, and what was told amiss.
"""

from __future__ import annotations

import difflib
import logging
import os
import socket
import sys
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any
from weakref import finalize

import torch

from dist_ckpt.errors import (
    CheckpointError,
    IncompatibleError,
    NotFound,
    UsageError,
    describe,
    near,
)
from dist_ckpt.format.names import parse_save_id
from dist_ckpt.loading.loader import LoadReport
from dist_ckpt.policy import Counted, SavePolicy, counted, passed_over
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.repository import status
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.repository.status import JobStatus, Phase
from dist_ckpt.saving.handle import Outcomes, SaveHandle
from dist_ckpt.saving.provenance import Metrics, Provenance, SaveContext
from dist_ckpt.saving.saver import Saver
from dist_ckpt.threads import Latch, start
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.early import TrainingOptions
from dist_ckpt.training.resuming import Resumer
from dist_ckpt.training.trigger import Decision, SaveTrigger

_log = logging.getLogger("dist_ckpt")
# Of a save that has all the time there is.
_NO_URGENCY = Decision(None)


class Recorder:
    """Saves what is told when that is due, and nothing twice. Every rank makes the same calls.

    Attributes:
        pace: decides when a save is due.
        course: what was told, and what of it is stored.
        program: what the manifests say of the program.
        heartbeat: says that the job is alive.
        interrupted: whether training ends by an exception.
        waits: whether a save is waited for.
    """

    def __init__(
        self,
        job: Job,
        saver: Saver,
        resumer: Resumer,
        policies: SavePolicies,
        *,
        save_last: bool,
        options: TrainingOptions,
    ) -> None:
        """Take what it works with.

        Args:
            job: the ranks.
            saver: of the state.
            resumer: what restores it.
            policies: by what it decides; where nobody said when to save, telling is an error.
            save_last: whether `finish` saves the step told last, if anything is ever due.
            options: what manifests say of the program, and how signs of life are given.

        Raises:
            UsageError: `save_last` is neither True nor False.
        """
        if not isinstance(save_last, bool):
            raise UsageError(f"save_last is True or False, not {save_last!r}")
        self.pace = SaveTrigger(
            job,
            policies.when,
            best=resumer.best_values,
            outlook=lambda: saver.outcomes.outlook(saver.in_flight),
        )
        watched = _WatchedMetrics(policies.criteria, job.url)
        saver.asked |= {"what when= leaves to rank 0": self.pace.kinds, "save_last": str(save_last)}
        self.course = Course(job.url, policies.when, watched)
        self.program = Provenance(command=options.saves.command, best=policies.criteria)
        self.heartbeat = Heartbeat(
            job,
            saver.outcomes,
            every_seconds=options.status_seconds,
            at_once=options.exclusive,
        )
        self.interrupted = False
        self.waits = False
        self._job = job
        self._saver = saver
        self._resumer = resumer
        self._can_save = policies.said
        self._save_last = save_last and policies.saves
        # Not of the recorder, which is gone by then; and not of one whose process was forked.
        self._leave = finalize(self, _say_left, self.course, os.getpid(), wanted=self._save_last)
        self._stoppers = policies.stoppers
        self._differing: set[str] = set()
        self._stepped = False

    def tell(self, step: int, epoch: int | None, metrics: Metrics) -> SaveHandle | None:
        """Take note that the state stands after `step`; save if that is due.

        Raises:
            UsageError: nobody said when to save, so nothing would ever be.
            CheckpointError: see `Checkpointer.save`.
        """
        if not self._can_save:
            raise UsageError(
                f"nothing was said of when to save, so step() and epoch_end() on {self._job.url} "
                "would never save: give every_steps=500 or when=policy.every(...), or "
                "when=policy.never() if save() alone is to save"
            )
        # The ranks find one another here at the latest: should one of them fail, the others hear.
        self.begin()
        verdict = self.pace.at(step, epoch, metrics)
        for stopper in self._stoppers:
            # Before the save: what is stored has seen this value.
            if stopper.criterion.metric in verdict.metrics:
                stopper.update(step, verdict.metrics[stopper.criterion.metric])
        self.course.tell(step, epoch, metrics, by_hand=False)
        self.heartbeat.pulse.tell(step)
        if self.course.is_done(step):
            if epoch is not None and step == self.course.stored_step:
                self._saver.note_late(step, epoch, metrics)
            return None
        if verdict.reason:
            return self._save(step, epoch, metrics, verdict.reason, urgency=verdict)
        if not self._stepped:
            self._stepped = True
            self._saver.prewarm()  # some optimizers show only after a step what they keep
        return None

    def restored(self, report: LoadReport | None, *, own: bool) -> None:
        """Take note of what training goes on from.

        Args:
            report: what was restored, None for a new run.
            own: whether it is of the run itself.
        """
        self.course.restored(report, own=own, refusal=self._resumer.refusal)
        self.pace.best = None
        self.heartbeat.restored(report if own else None, looks_back=self.course.leads)
        self._saver.look_around()
        self._saver.prewarm()  # optimizers may have their state only now
        if report is not None and self._job.training.rank == 0:
            self.program.resumed = self._resumer.record(report.step) or self.program.resumed

    def save(
        self, step: int, metrics: Metrics, metadata: Mapping[str, Any], failed: Exception | None
    ) -> SaveHandle:
        """Save `step` now, unless it is done; `failed` is what keeps this rank from it."""
        done = self.course.done(step)
        if done is not None:
            if metadata and self._job.training.rank == 0:
                _log.warning(
                    "step %d of %s is stored already, without the metadata of this save: %s",
                    step,
                    self._job.url,
                    ", ".join(metadata),
                )
            if metrics and step == self.course.stored_step:
                self._saver.note_late(step, None, metrics)
            return done
        self.begin()
        self.course.tell(step, None, metrics, by_hand=True)
        self.heartbeat.pulse.tell(step)
        return self._save(step, None, metrics, "asked for", metadata, failed=failed)

    def begin(self) -> None:
        """Take note, at the beginning of a call of all ranks, which of them is to say something."""
        self.course.leads = self._job.training.rank == 0
        if self.course.leads or self._job.ranks.node_local:
            self.heartbeat.begin()  # who leads a host is known later; the others say nothing

    def finish(self) -> None:
        """Save the step told last, if it was not; nothing more is told.

        Raises:
            CheckpointError: see `Checkpointer.save`.
        """
        if not self.interrupted and (error := self.course.ended_by()) is not None:
            # As at the end of a `with` block, where others are not waited for either.
            self._job.hurry()
            self.interrupted = True
            if self._save_last:
                self.course.say_unsaved(
                    f"close() came while a {type(error).__qualname__} was handled, when the state "
                    "may be in the middle of another step (save() it before, or close later)"
                )
        # After an exception the state may be in the middle of a step.
        wanted = self._save_last and not self.interrupted and not self.pace.out_of_time
        last = self.course.unsaved if wanted else None
        try:
            if last is not None or (wanted and self._saver.outcomes.warns):
                # Over before the last one begins, which must be neither skipped nor given up.
                failed = self._saver.settle()
                if self._saver.outcomes.bears(failed):
                    # Its step may be the last one: this is the last time that it can be tried.
                    last, failed = last or self.course.lost, None
                if last is not None:
                    self._save_the_last(last)
                if failed is not None:
                    raise failed
        finally:
            if not self.interrupted:
                self.course.close()
            self.pace.end()

    def close(self, *, well: bool) -> None:
        """Let go of signals and say how it ended, when no save is in flight any more."""
        # What it says is of a Checkpointer that was forgotten.
        self._leave.detach()
        self.heartbeat.end("ended" if well and not self.interrupted else "failed")
        self.pace.close()

    def _save_the_last(self, last: ToldStep) -> None:
        handle = self._save(last.step, last.epoch, last.metrics, "the last step")
        if handle.failed and handle.error is not None:
            raise handle.error  # there is no next one that it could be left to

    def _save(
        self,
        step: int,
        epoch: int | None,
        metrics: Metrics,
        reason: str,
        metadata: Mapping[str, Any] = MappingProxyType({}),
        *,
        urgency: Decision = _NO_URGENCY,
        failed: Exception | None = None,
    ) -> SaveHandle:
        if self._job.training.rank == 0:
            self.program.look()
        about = SaveContext(
            reason, epoch, self.program, self.program.elapsed_seconds(), self._differing, metadata
        )
        # Before anything is waited for below: that is of the same grace.
        until = Deadline.after(urgency.within_seconds)
        if urgency.urgent:
            # Over first: this one must be neither skipped nor take the other's place.
            self._saver.finish_pending()
        try:
            handle = self._saver.start(
                step, metrics, about, within_seconds=until.remaining_seconds, failed=failed
            )
        except BaseException:
            self.course.let_go()  # told by this very error: the end need not try again
            raise
        if handle.outcome == "skipped":
            return handle
        begun = bool(handle.save_id)
        self.pace.saved(lost=self._saver.outcomes.lost, begun=begun)
        if not begun:
            return handle
        self.course.save_begun(step, handle)
        self.heartbeat.pulse.begun(handle)
        if self.waits:
            handle.settle()
            if not self._saver.outcomes.bears(handle.error):
                handle.wait()
        # Last: who is told of the save before has this one all the same.
        self._saver.tell_earlier(step)
        return handle


def _say_left(course: Course, pid: int, *, wanted: bool) -> None:
    """Say what is lost with a Checkpointer that was never closed."""
    if wanted and pid == os.getpid():
        course.say_unsaved("the Checkpointer was not closed (use it in a `with` block)")


# What a Checkpointer was told of the training so far, and what of it is stored.


@dataclass(frozen=True, slots=True)
class ToldStep:
    """The last thing that was told.

    Attributes:
        step: which step the state stood after.
        epoch: which epoch ended with it, None in the middle of one.
        metrics: what was given with it.
    """

    step: int
    epoch: int | None
    metrics: Metrics = field(default_factory=dict)


class Course:
    """Knows which steps are done, and which one would be lost if the training ended here.

    All of it follows from calls that every rank makes alike, so all ranks know the same.

    Attributes:
        leads: whether this rank is the one to say something.
    """

    def __init__(self, url: str, when: SavePolicy, watched: _WatchedMetrics) -> None:
        self._url = url
        self._when = when
        self._watched = watched
        self._last: ToldStep | None = None
        # Whether the state is still the one that the last call told of.
        self._live = False
        # What was being handled then: a training may run as a whole where something is.
        self._handled: int | None = None
        self._restored: LoadReport | None = None
        self._done: dict[int, SaveHandle] = {}
        self._saved: int | None = None
        self._newest = -1
        self._kinds: set[str] = set()
        self._told_step: int | None = None
        # What was told last of what policies count; a restored state stands after its step.
        self._numbers: dict[Counted, int] = {}
        self._said: set[str] = set()
        self.leads = False
        self._refusal: UsageError | None = None

    @property
    def told_step(self) -> int | None:
        """The step that was told last; None where only ends of epochs were."""
        return self._told_step

    @property
    def stored_step(self) -> int | None:
        """The step that was saved last, or else restored: what is told now may be of that."""
        restored = None if self._restored is None else self._restored.step
        return restored if self._saved is None else self._saved

    @property
    def unsaved(self) -> ToldStep | None:
        """What was told last, if no save of it was begun and the state is still that."""
        last = self._last
        return None if last is None or not self._live or self.is_done(last.step) else last

    def ended_by(self) -> BaseException | None:
        """Return the exception that is being handled here, if it came after the last telling."""
        error = sys.exception()
        return None if error is None or id(error) == self._handled else error

    @property
    def lost(self) -> ToldStep | None:
        """What was told last, if the save of it failed and the state is still that."""
        last = self._last
        handle = self._done.get(last.step) if last is not None and self._live else None
        return last if handle is not None and handle.failed else None

    def tell(self, step: int, epoch: int | None, metrics: Metrics, *, by_hand: bool) -> None:
        """Take note that the state stands after `step`; see `Checkpointer.step`.

        Args:
            step: which.
            epoch: which epoch ended with it, None in the middle of one.
            metrics: what was given with it.
            by_hand: whether a save of that very step was asked for, whatever policies say.

        Raises:
            UsageError: training may not go on from here.
        """
        if self._refusal is not None:
            raise self._refusal
        # What is no step at all is refused by the save of it, on all ranks together.
        if isinstance(step, int) and step < self._newest and not self.is_done(step):
            self._say(
                "backwards",
                f"step {step} was told to the Checkpointer of {self._url} after step "
                f"{self._newest} was stored: steps that were saved are not saved again, and older "
                "ones are refused. Restore an earlier step, or go on from the last one",
            )
        told = "saves" if by_hand else "steps" if epoch is None else "epochs"
        if told == "epochs" and "steps" not in self._kinds and "steps" in counted(self._when):
            self._say(
                "steps",
                f"{self._when} of {self._url} counts steps, and only the end of an epoch was told: "
                "call step() after each step, or save by when=policy.every(epochs=1)",
            )
        self._kinds.add(told)
        numbers: dict[Counted, int | None] = {"steps": step, "epochs": epoch}
        for of, number in numbers.items():
            # Whatever else was told as a step is refused elsewhere.
            if isinstance(number, int):
                last = self._numbers.get(of, number)
                self._numbers[of] = number
                if number > last + 1 and not by_hand:
                    self._tell_jumped(of, last, number)
        if self.leads:
            self._watched.tell(step, metrics.keys(), epoch_over=epoch is not None)
        if epoch is None:
            self._told_step = step
        self._last, self._live = ToldStep(step, epoch, _let_go(metrics)), True
        error = sys.exception()
        self._handled = None if error is None else id(error)

    def _tell_jumped(self, of: Counted, last: int, now: int) -> None:
        missed = passed_over(self._when, previous=last, now=now, of=of)
        if missed is not None:
            self._say(
                "passed over",
                f"{missed} of {self._url} was due between, and at none of the {of} from {last} to "
                f"{now} that were told: no save is made for it. Tell each, or choose numbers that "
                "those told come to",
            )

    def save_begun(self, step: int, handle: SaveHandle) -> None:
        """Take note of a save."""
        self._done[step] = handle
        self._saved = step
        self._newest = max(self._newest, step)

    def restored(self, report: LoadReport | None, *, own: bool, refusal: UsageError | None) -> None:
        """Take note that the state is another one.

        Args:
            report: where it comes from.
            own: whether from the run itself.
            refusal: why training may not go on from it.
        """
        self._live = False
        self._refusal = refusal
        # Steps behind the restored one are taken again, and what comes of them is saved again.
        self._done.clear()
        self._restored = report if own else None
        self._saved, self._newest = None, -1
        self._numbers.clear()
        if self._restored is not None:
            self._newest = self._numbers["steps"] = self._restored.step

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Put another state in the place of the one after the last step, in a `with` block."""
        try:
            yield
        except (UsageError, NotFound, IncompatibleError):
            raise  # found out before anything was changed
        except BaseException:
            self._live = False
            raise
        self._live = False

    def let_go(self) -> None:
        """Take note that the last step is not to be saved: its save failed, and that was told."""
        self._live = False

    def is_done(self, step: int) -> bool:
        """Whether a save of `step` was begun, or it was restored; the handle tells its end."""
        restored = self._restored
        return step in self._done or (restored is not None and step == restored.step)

    def done(self, step: int) -> SaveHandle | None:
        """Return the handle of the checkpoint of `step` that was saved or restored, if there is.

        Waits until that save is over: only then do all ranks know how it ended.
        """
        # `True` and `1.0` are no steps, though they are found where 1 is.
        if type(step) is not int or not self.is_done(step):
            return None
        handle = self._done.get(step)
        if handle is None:
            assert self._restored is not None  # as there is no save of it
            return SaveHandle.committed(step, self._restored.save_id)
        handle.settle()
        return handle if handle.outcome == "committed" else None

    def say_unsaved(self, why: str) -> None:
        """Say that the step told last is not saved, if it is not."""
        if self.unsaved is not None:
            self._say(
                "unsaved",
                f"step {self.unsaved.step} of {self._url} was told, no save of it was due, and "
                f"{why}: it is not saved",
            )

    def close(self) -> None:
        """Say what the end of the training shows to have been a mistake."""
        if "epochs" in counted(self._when) and self._kinds == {"steps"}:
            self._say(
                "epochs",
                f"{self._when} of {self._url} counts the ends of epochs, and none was told: call "
                "epoch_end() after each epoch",
            )
        if self.leads:
            self._watched.close()

    def _say(self, what: str, text: str) -> None:
        """Say it once; the other ranks would say the same."""
        if self.leads and what not in self._said:
            self._said.add(what)
            _log.warning("%s", text)


def _let_go(metrics: Metrics) -> Metrics:
    """Return the metrics without what tensors in them hold on to: the graph of a loss is large."""
    return {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in metrics.items()
    }


# Metrics by which something is decided, and that nobody ever tells: they may be misspelt.


# So alike are slips of the pen, and not yet `train/loss` and `val/loss`.
_SLIP = 0.8


class _WatchedMetrics:
    """Says once of each metric which is watched, and never told, that it is not.

    A name like it among those that are told is a slip of the pen, and said at once. Else it is said
    after the first epoch whose metrics do not have it, and at the end at the latest: most metrics
    are known at the ends of epochs only.
    """

    def __init__(self, criteria: Sequence[Criterion], url: str) -> None:
        self._missing = {criterion.metric for criterion in criteria}
        self._url = url
        self._seen: set[str] = set()
        self._step: int | None = None

    def tell(self, step: int, names: Collection[str], *, epoch_over: bool) -> None:
        """Take note of the metrics told with `step`."""
        self._step = step
        if not self._missing:
            return  # the usual case, from the first complete telling on
        self._seen |= {name for name in names if isinstance(name, str)}
        self._missing -= self._seen
        slips = {
            name
            for name in self._missing
            if difflib.get_close_matches(name, self._seen, n=1, cutoff=_SLIP)
        }
        self._say(self._missing.copy() if epoch_over and names else slips)

    def close(self) -> None:
        """Say what was never told, if anything was told at all."""
        if self._step is not None:
            self._say(self._missing.copy())

    def _say(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            self._missing.discard(name)
            known = ", ".join(map(repr, sorted(self._seen))) or "none"
            _log.warning(
                "step %d in %s has no metric %r (it has: %s)%s, so nothing can be the best by it, "
                "be kept for it or stop the training: give it as metrics={%r: ...}, or watch "
                "another one",
                self._step,
                self._url,
                name,
                known,
                near(name, self._seen),
                name,
            )


# The sign of life that rank 0 gives in the background, beside saves and steps.


# How long the end of a training waits for its last word, which nobody needs for certain.
_LAST_SECONDS = 5.0
# So many starts in vain are no accident any more.
_MANY_STARTS = 2
# Between two looks whether the run is taken over: who comes next is to see a sign of life at once.
_FIRST_NAP_SECONDS = 0.01
_LONGEST_NAP_SECONDS = 0.2


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

    def restored(self, step: int | None) -> None:
        """Take note that training goes on from `step` of the run, whatever was saved before."""
        self.save = None  # first: what it was must not count again
        self.phase, self.step, self.commit = "training", None, step

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
        self.pulse.restored(None if report is None else report.step)
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
        # Where the last word is "ended", no later start counts this one as in vain (commit-v1, 10).
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
            # No save, and so no training, may fail because of a status (commit-v1, section 10).
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
            # By this alone readers tell life from death: clocks of hosts may be hours apart.
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
    # A save id bears the number of the claim under which it was saved (commit-v1, section 2).
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
