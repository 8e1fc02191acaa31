"""From what a training tells to the saves of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dist_ckpt.errors import UsageError
from dist_ckpt.loading.report import LoadReport
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.saving.metrics import Metrics
from dist_ckpt.saving.provenance import Provenance, SaveContext
from dist_ckpt.saving.saver import Saver
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.course import Course, ToldStep, WatchedMetrics
from dist_ckpt.training.early import TrainingOptions
from dist_ckpt.training.heartbeat import Heartbeat
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
        watched = WatchedMetrics(policies.criteria, job.url)
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
        self.course.tell(step, epoch, metrics, kind="steps" if epoch is None else "epochs")
        self.heartbeat.pulse.tell(step)
        if self.course.is_done(step):
            if epoch is not None and step == self.course.saved_step:
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
        self.heartbeat.restored(report if own else None, looks_back=self.course.leads)
        self._saver.look_around()
        self._saver.prewarm()  # optimizers may have their state only now
        if report is None:
            return
        if self._job.training.rank == 0 and (record := self._resumer.record(report.step)):
            self.program.go_on(record.started, record.elapsed_seconds)

    def save(self, step: int, metrics: Metrics, metadata: Mapping[str, Any]) -> SaveHandle:
        """Save `step` now, unless it is done."""
        done = self.course.done(step)
        if done is not None:
            if metadata and self._job.training.rank == 0:
                _log.warning(
                    "step %d of %s is stored already, without the metadata of this save: %s",
                    step,
                    self._job.url,
                    ", ".join(metadata),
                )
            if metrics and step == self.course.saved_step:
                self._saver.note_late(step, None, metrics)
            return done
        self.begin()
        self.course.tell(step, None, metrics, kind="saves")
        self.heartbeat.pulse.tell(step)
        return self._save(step, None, metrics, "asked for", metadata)

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
    ) -> SaveHandle:
        if self._job.training.rank == 0:
            self.program.look()
        about = SaveContext(
            reason, epoch, self.program, self.program.elapsed_seconds(), self._differing, metadata
        )
        until = Deadline.after(urgency.within_seconds)
        if urgency.urgent:
            # Over first: this one must be neither skipped nor take the other's place.
            self._saver.finish_pending()
        try:
            handle = self._saver.start(step, metrics, about, within_seconds=until.remaining_seconds)
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
