"""The ways to begin: anew, from a checkpoint of the run, from another run, from weights alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError, NotFound, UsageError
from dist_ckpt.format.names import discard_key
from dist_ckpt.loading.loader import Loader
from dist_ckpt.loading.report import LoadReport
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.node_local import claim_folders
from dist_ckpt.repository.discard import check_first_start, left_behind
from dist_ckpt.repository.history import History, Record
from dist_ckpt.repository.marks import read_epoch_note
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.state.roles import best_step, main_model, parts_of, stoppers_of
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.start import Start

AnswerT = TypeVar("AnswerT", int, dict[str, float])

_log = logging.getLogger("dist_ckpt")


class Resumer:
    """Restores the state of one job, from wherever it is asked to.

    What `failed` is in its methods: the failure of a save that nobody was told of yet. It ends the
    restore on all ranks.

    Attributes:
        refusal: why training may not go on from what was restored last, None where it may.
    """

    def __init__(self, job: Job, state: TrainState, policies: SavePolicies) -> None:
        """Made with the Checkpointer.

        Args:
            job: the ranks, and the run.
            state: what is restored.
            policies: by the first metric of them there is a best. A job that saves by itself takes
                the run over as it restores; another one may be there to look, and takes it over
                when it first saves.
        """
        self._job = job
        self._state = state
        self._criteria = policies.criteria
        self._saves = policies.saves
        self.refusal: UsageError | None = None
        self._loader = Loader(job, state)

    def restore(
        self,
        start: Start,
        failed: Exception | None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> LoadReport | None:
        """Restore what `start` says; None for a new run.

        Args:
            start: where training goes on from.
            failed: see the class.
            options: the keywords of `LoadOptions`.

        Raises:
            UsageError: nobody said what the best is, or the run has checkpoints that would be left
                behind; nothing was changed, and the run not taken over.
            NotFound: there is nothing to go on from.
        """
        if start.which == "none" and options:
            raise UsageError(f"restore('none') restores nothing: {', '.join(options)} say nothing")
        if start.discard_newer and self._job.ranks.node_local:
            raise UsageError(
                "discard_newer=True with node_local=True: what is newer would have to be hidden in "
                "the folder of each host; delete it there (dist-ckpt rm), or begin another run"
            )
        self.refusal = None
        self._job.restore_asked = True
        step = start.step
        if start.which == "best":
            step = self._ask("best", self._best_step, failed)
            failed = None  # that round has told all ranks
        origin = -1 if start.begins or step is None else step
        claims = self._saves or start.is_newest or start.discard_newer
        if start.new_run or (claims and not start.is_newest):
            # Before the claim: whoever is refused has taken the run from nobody.
            newest = self._ask("newer", lambda: self._check_newer(start, origin), failed)
            failed = None
            if newest > origin and not start.discard_newer:
                self.refusal = left_behind(self._job.url, origin, [newest])
        report = self._fill(start, step, claims=claims, failed=failed, options=options or {})
        if start.discard_newer:
            self._ask("discard", lambda: self._give_up(origin), None)
        return report

    def rollback(self, failed: Exception | None) -> LoadReport:
        """Restore the models of the best checkpoint, and nothing else; the run is as it was.

        Raises:
            UsageError: nobody said by which metric.
            NotFound: no checkpoint has the metric.
        """
        step = self._ask("best", self._best_step, failed)
        report = self._loader.load(
            step,
            options={"only": parts_of(self._state, "model")},
            fall_back=False,
            own=False,
        )
        assert report is not None  # this very step was asked for
        return report

    def best_values(self, criteria: Sequence[Criterion]) -> dict[Criterion, float]:
        """Rank 0: return the best values by `criteria` among the checkpoints of the run."""
        damaged = self._job.passed_over.steps  # nobody could go back to one of these
        records = [each for each in self._job.repository.records() if each.step not in damaged]
        ranked = {criterion: criterion.ranked(records) for criterion in criteria}
        return {criterion: criterion.of(found[0]) for criterion, found in ranked.items() if found}

    def record(self, step: int) -> Record | None:
        """Rank 0: what is said of a checkpoint; None, and a word in the log, when that fails."""
        try:
            found = History(self._job.repository.store).read([step])
        except CheckpointError as error:
            _log.warning("step %d in %s was restored, but: %s", step, self._job.url, error)
            return None
        return found[0] if found else None

    def _fill(
        self,
        start: Start,
        step: int | None,
        *,
        claims: bool,
        failed: Exception | None,
        options: Mapping[str, Any],
    ) -> LoadReport | None:
        """Fill the state with what `start` names."""
        report: LoadReport | None = None
        if start.which == "none":
            self._ask("none", self._take_over if claims else int, failed)
            if claims and self._job.ranks.node_local:
                topic = self._job.topic("claim", f"beginning in {self._job.url}")
                claim_folders(self._job, topic, self._job.deadline())
            self._job.go_on(None)
        else:
            skip = parts_of(self._state, "optimizer", "scheduler") if start.reset_optimizer else []
            report = self._loader.load(
                step,
                place=start.place,
                options={**options, **({"skip": skip} if skip else {})},
                fall_back=start.is_newest,
                own=True,
                claims=claims,
                failed=failed,
            )
        if report is None and start.must_exist:
            raise NotFound(
                f"--resume: no checkpoint in {self._job.url} to go on from; give --auto-resume to "
                "begin where there is none",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        if report is None and start.weights is not None:
            self._loader.load(
                None,
                place=start.weights,
                options={"only": [main_model(self._state)]},
                fall_back=False,
                own=True,
                claims=claims,
            )
        elif report is not None and start.place is None:
            self._hear_of_late_metrics(report)
        return report

    def _take_over(self) -> int:
        """Rank 0: take the run over; those in folders of several hosts all ranks take together."""
        return 0 if self._job.ranks.node_local else self._job.claim()

    def _check_newer(self, start: Start, origin: int) -> int:
        """Rank 0: check that no checkpoint would be left behind; return the newest one.

        A job that made them itself may go back to look, as at the end of a training.
        """
        repository = self._job.repository
        newer = repository.newer(origin, besides=self._job.passed_over.steps)
        if newer and start.new_run and not start.discard_newer:
            raise UsageError(
                f"{start.new_run} begins a run, but {self._job.url} has checkpoints up to step "
                f"{newer[-1]}: give --auto-resume or --resume to go on with it, another "
                "--checkpoint-dir, or --discard-newer to give them up"
            )
        if newer and not start.discard_newer and not self._job.has_committed:
            raise left_behind(self._job.url, origin, newer)
        if newer and start.discard_newer:
            check_first_start(self._job.url, newer)
        if newer and (pinned := [step for step in repository.pinned() if step > origin]):
            raise UsageError(
                f"discard_newer=True gives up step {', '.join(map(str, pinned))} in "
                f"{self._job.url}, which is pinned: unpin it first, or train in another run"
            )
        return newer[-1] if newer else -1

    def _give_up(self, origin: int) -> int:
        """Rank 0: hide what is newer than `origin`; only now, when that is restored."""
        newer = self._job.repository.newer(origin)
        if newer:
            self._job.give_up(newer, after=origin)
            _log.warning(
                "step %s in %s was given up: not listed any more, and deleted after the next "
                "commit; until then, deleting %s brings it back",
                ", ".join(map(str, newer)),
                self._job.url,
                discard_key(self._job.claim()),
            )
        return len(newer)

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
