"""What rank 0 does after a commit: retention and garbage, beside the saves that follow."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dist_ckpt import events
from dist_ckpt.errors import as_ours
from dist_ckpt.ranks.job import Job
from dist_ckpt.saving.background import WriterThread
from dist_ckpt.saving.retention import Retention

_log = logging.getLogger("dist_ckpt")


class Tidier:
    """Deletes what is not wanted any more. It is no part of a save: none waits for it to begin.

    Attributes:
        litter: whether files of dead attempts may lie around: at the start, after a failed save.
    """

    def __init__(self, job: Job, retention: Retention) -> None:
        self._job = job
        self._retention = retention
        self._thread = WriterThread("dist_ckpt-tidy")
        # Looked at while garbage is collected, so it must always hold what is being written.
        self._in_flight: set[str] = set()
        self.litter = True

    def begin(self, step: int) -> str:
        """Open an attempt whose files are no garbage; return its save_id. See `Job.begin`."""
        save_id = self._job.begin(step)
        # Before the first file of it can be listed, and before the one before is let go.
        before = set(self._in_flight)
        self._in_flight.add(save_id)
        self._in_flight -= before
        return save_id

    def submit(self, step: int) -> None:
        """Tidy up in the background after the commit of `step`."""
        self._thread.submit(lambda: self.run(step))

    def submit_job(self, job: Callable[[], None]) -> None:
        """Run `job` in the background, after the tidying that was submitted; it must not raise."""
        self._thread.submit(job)

    def run(self, step: int) -> None:
        """Tidy up after the commit of `step`. A failure here never undoes the commit."""
        repository, url = self._job.repository, self._job.url
        try:
            self._retention.after(step)
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

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until nothing is left to tidy up; return whether that is so."""
        return self._thread.wait_idle(timeout_seconds)

    def stop(self) -> None:
        """Let the thread end when it is done."""
        self._thread.stop()
