"""From what a training tells to the saves of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dist_ckpt.errors import UsageError
from dist_ckpt.loading.report import LoadReport
from dist_ckpt.ranks.job import Job
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.about import About
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.saving.metrics import Metrics
from dist_ckpt.saving.provenance import Origin
from dist_ckpt.saving.saver import Saver
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.course import Course
from dist_ckpt.training.resuming import Resumer
from dist_ckpt.training.trigger import Pace
from dist_ckpt.training.watched import WatchedMetrics


class Recorder:
    """Saves what is told when that is due, and nothing twice. Every rank makes the same calls.

    Attributes:
        pace: decides when a save is due.
        course: what was told, and what of it is stored.
        program: what the manifests say of the program.
        interrupted: whether training ends by an exception.
        waits: whether a save is waited for.
    """

    def __init__(
        self,
        job: Job,
        saver: Saver,
        policies: SavePolicies,
        *,
        best: Callable[[Sequence[Criterion]], Mapping[Criterion, float]],
        save_last: bool,
        command: bool = False,
    ) -> None:
        """Take what it works with.

        Args:
            job: the ranks.
            saver: of the state.
            policies: by what it decides; where nobody said when to save, telling is an error.
            best: see `Pace`.
            save_last: whether `finish` saves the step told last, if anything is ever due.
            command: whether manifests have the whole command line.

        Raises:
            UsageError: `save_last` is neither True nor False.
        """
        if not isinstance(save_last, bool):
            raise UsageError(f"save_last is True or False, not {save_last!r}")
        self.pace = Pace(job, policies.when, best=best)
        watched = WatchedMetrics(policies.criteria, job.url)
        self.course = Course(job.url, policies.when, watched)
        self.program = Origin(command=command)
        self.interrupted = False
        self.waits = False
        self._job = job
        self._saver = saver
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
        self.course.leads = self._job.training.rank == 0
        verdict = self.pace.at(step, epoch, metrics)
        for stopper in self._stoppers:
            # Before the save: what is stored has seen this value.
            if stopper.criterion.metric in verdict.metrics:
                stopper.update(step, verdict.metrics[stopper.criterion.metric])
        self.course.tell(step, epoch, metrics, kind="steps" if epoch is None else "epochs")
        if self.course.is_done(step):
            if epoch is not None and step == self.course.saved_step:
                self._saver.note_late(step, epoch, metrics)
            return None
        if verdict.reason:
            return self._save(step, epoch, metrics, verdict.reason)
        if not self._stepped:
            self._stepped = True
            self._saver.prewarm()  # some optimizers show only after a step what they keep
        return None

    def restored(self, report: LoadReport | None, resumer: Resumer, *, own: bool) -> None:
        """Take note of what training goes on from.

        Args:
            report: what was restored, None for a new run.
            resumer: what restored it.
            own: whether it is of the run itself.
        """
        self.course.restored(report, own=own, refusal=resumer.refusal)
        self._saver.look_around()
        self._saver.prewarm()  # optimizers may have their state only now
        if report is None:
            return
        if self._job.training.rank == 0 and (record := resumer.record(report.step)):
            self.program.go_on(record.started, record.elapsed_seconds)

    def save(self, step: int, metrics: Metrics) -> SaveHandle:
        """Save `step` now, unless it is done."""
        done = self.course.done(step)
        if done is not None:
            if metrics and step == self.course.saved_step:
                self._saver.note_late(step, None, metrics)
            return done
        self.course.leads = self._job.training.rank == 0
        self.course.tell(step, None, metrics, kind="saves")
        return self._save(step, None, metrics, "asked for")

    def finish(self) -> None:
        """Save the step told last, if it was not; nothing more is told.

        Raises:
            CheckpointError: see `Checkpointer.save`.
        """
        # After an exception the state may be in the middle of a step.
        wanted = self._save_last and not self.interrupted
        last = self.course.unsaved if wanted else None
        try:
            if last is not None:
                # Over before the last one begins, which must be neither skipped nor given up.
                failed = self._saver.settle()
                self._save(last.step, last.epoch, last.metrics, "the last step")
                if failed is not None:
                    raise failed
        finally:
            if not self.interrupted:
                self.course.close()
            self.pace.close()

    def _save(self, step: int, epoch: int | None, metrics: Metrics, reason: str) -> SaveHandle:
        if self._job.training.rank == 0:
            self.program.look()
        about = About(reason, epoch, self.program, self.program.elapsed_seconds(), self._differing)
        try:
            handle = self._saver.start(step, metrics, about)
        except BaseException:
            self.course.let_go()  # told by this very error: the end need not try again
            raise
        if handle.outcome == "skipped":
            return handle
        self.course.save_begun(step, handle)
        self.pace.saved()
        if self.waits:
            handle.wait()
        # Last: who is told of the save before has this one all the same.
        self._saver.tell_earlier(step)
        return handle
