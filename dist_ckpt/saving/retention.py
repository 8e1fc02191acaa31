"""What rank 0 does about older checkpoints after each commit, on the background thread."""

from __future__ import annotations

import logging

from dist_ckpt import events
from dist_ckpt.errors import as_ours
from dist_ckpt.ranks.job import Job
from dist_ckpt.repository.history import History
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.marks import EpochNote, put_epoch_note

_log = logging.getLogger("dist_ckpt")


class Retention:
    """Keeps what a policy keeps. Used by the background thread of rank 0 alone."""

    def __init__(self, job: Job, policy: KeepPolicy | None) -> None:
        """Remember what to keep; None is everything."""
        self._job = job
        self._policy = policy
        self._history = History(job.repository.store)

    def after(self, step: int) -> None:
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
            protected={step} if origin is None else {step, origin},
            damaged=self._job.passed_over.steps,
            history=self._history,
        )
        for old, reason in gone.items():
            events.emit(events.CheckpointDeleted(self._job.url, old, 0, reason))

    def note_epoch(self, step: int, note: EpochNote) -> None:
        """Say of the committed `step` what is known only now, then do as `after`.

        A failure is told by an event and the log, not raised: the checkpoint is as good as before.
        """
        store = self._job.repository.store
        try:
            record = self._history.of(step)
            if record is not None:  # else its save failed, and that is told elsewhere
                put_epoch_note(store, step, record.save_id, note)
                self.after(step)
        except Exception as error:  # a policy of the user may raise anything
            self.tell_failed(step, error)

    def tell_failed(self, step: int, error: Exception) -> None:
        """Say that something about a committed checkpoint could not be noted."""
        failure = as_ours(error)
        events.emit(events.RetentionFailed(self._job.url, step, 0, failure))
        _log.warning("noting metrics of step %d in %s failed: %s", step, self._job.url, failure)
