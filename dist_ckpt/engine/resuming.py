"""The ways to begin: anew, from a checkpoint of the run, from another run, from weights alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from dist_ckpt.engine.job import Job, Place
from dist_ckpt.engine.loading import Loader
from dist_ckpt.engine.report import LoadReport
from dist_ckpt.engine.starting import best_step, main_model, parts_of, stoppers_of
from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError, NotFound, UsageError
from dist_ckpt.repository.history import History, Record
from dist_ckpt.repository.marks import read_epoch_note
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.state.train_state import TrainState

AnswerT = TypeVar("AnswerT", int, dict[str, float])

_log = logging.getLogger("dist_ckpt")


class Resumer:
    """Restores the state of one job, from wherever it is asked to.

    What `failed` is in its methods: the failure of a save that nobody was told of yet. It ends the
    restore on all ranks.
    """

    def __init__(self, job: Job, state: TrainState, criteria: Sequence[Criterion]) -> None:
        self._job = job
        self._state = state
        self._criteria = criteria
        self._loader = Loader(job, state)

    def own(
        self,
        step: int | None,
        failed: Exception | None,
        *,
        place: Place | None = None,
        skip: Collection[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> LoadReport | None:
        """Take the run over and restore `step`, or the newest good one; None when there is none.

        Args:
            step: which one.
            failed: see the class.
            place: where from instead; that run is not taken over.
            skip: parts to leave as they are.
            options: the keywords of `LoadOptions`.
        """
        report = self._load(step, own=True, place=place, failed=failed, skip=skip, options=options)
        if report is not None and place is None:
            self._hear_of_late_metrics(report)
        return report

    def best(
        self,
        failed: Exception | None,
        *,
        model_only: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> LoadReport:
        """Restore the best checkpoint, or only the models of it.

        Raises:
            UsageError: nobody said by which metric.
            NotFound: no checkpoint has the metric.
        """
        step = self._ask("best", self._best_step, failed)
        only = parts_of(self._state, "model") if model_only else ()
        report = self._load(step, own=not model_only, only=only, options=options)
        assert report is not None  # this very step was asked for
        if not model_only:
            self._hear_of_late_metrics(report)
        return report

    def existing(
        self, step: int | None, failed: Exception | None, *, reset_optimizer: bool
    ) -> LoadReport:
        """Do as `own`, but a run without a checkpoint is an error.

        Raises:
            NotFound: there is nothing to go on from.
        """
        skip = parts_of(self._state, "optimizer", "scheduler") if reset_optimizer else ()
        report = self.own(step, failed, skip=skip)
        if report is None:
            raise NotFound(
                f"--resume: no checkpoint in {self._job.url} to go on from; give --auto-resume to "
                "begin where there is none",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        return report

    def elsewhere(self, place: str, *, reset_optimizer: bool) -> LoadReport:
        """Restore from another run, for a run that has no checkpoint yet.

        Raises:
            UsageError: this run has checkpoints.
        """
        self.check_new(f"--resume {place}")
        skip = parts_of(self._state, "optimizer", "scheduler") if reset_optimizer else ()
        return self._load_from(place, skip=skip)

    def weights(self, place: str) -> LoadReport:
        """Fill the model of the state with that of another run, or of one of its steps."""
        return self._load_from(place, only=[main_model(self._state)])

    def check_new(self, asked: str) -> None:
        """Check that the run has no checkpoint yet.

        Raises:
            UsageError: it has; `asked` is what asks for a new one.
        """
        newest = self._ask("new", self._newest, None)
        if newest >= 0:
            raise UsageError(
                f"{asked} begins a run, but {self._job.url} has checkpoints up to step {newest}: "
                "give --auto-resume or --resume to go on with it, or another --checkpoint-dir"
            )

    def record(self, step: int) -> Record | None:
        """Rank 0: what is said of a checkpoint; None, and a word in the log, when that fails."""
        try:
            found = History(self._job.repository.store).read([step])
        except CheckpointError as error:
            _log.warning("step %d in %s was restored, but: %s", step, self._job.url, error)
            return None
        return found[0] if found else None

    def _load_from(
        self, place: str, *, only: Collection[str] = (), skip: Collection[str] = ()
    ) -> LoadReport:
        report = self._load(None, own=True, place=place, only=only, skip=skip)
        assert report is not None  # a place that was named has to have something
        return report

    def _load(
        self,
        step: int | None,
        *,
        own: bool,
        place: Place | None = None,
        failed: Exception | None = None,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> LoadReport | None:
        """Load all parts, `only` some, or all but those in `skip`."""
        chosen = {"only": list(only)} if only else {"skip": list(skip)} if skip else {}
        return self._loader.load(
            step,
            place=place,
            options={**(options or {}), **chosen},
            fall_back=own and step is None and place is None,
            own=own,
            failed=failed,
        )

    def _newest(self) -> int:
        newest = self._job.repository.latest()
        return -1 if newest is None else newest

    def _best_step(self) -> int:
        damaged = self._job.passed_over.steps
        records = [each for each in self._job.repository.records() if each.step not in damaged]
        return best_step(records, self._criteria, where=self._job.url)

    def _hear_of_late_metrics(self, report: LoadReport) -> None:
        """Let early stopping see what became known of the checkpoint right after its save."""
        stoppers = stoppers_of(self._state)
        if not stoppers:
            return

        def late() -> dict[str, float]:
            try:
                note = read_epoch_note(self._job.repository.store, report.step, report.save_id)
            except IntegrityError as error:
                # The checkpoint itself is whole, and was restored.
                _log.warning("%s", error)
                return {}
            return {} if note is None else note.metrics

        metrics = self._ask("late", late, None)
        for stopper in stoppers:
            if stopper.criterion.metric in metrics:
                stopper.update(report.step, metrics[stopper.criterion.metric])

    def _ask(self, what: str, answer: Callable[[], AnswerT], failed: Exception | None) -> AnswerT:
        """Return what `answer` returns on rank 0: an integer, or numbers by name."""
        topic = self._job.topic("ask", f"looking into {self._job.url}").opening(what)
        data = self._job.training.round(
            topic,
            failed or b"",
            lambda _: msgspec.msgpack.encode(answer()),
            deadline=self._job.deadline(),
        )
        found: AnswerT = msgspec.msgpack.decode(data)
        return found
