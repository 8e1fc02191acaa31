"""The object of the training loop. Thin: it decides when, the engine does the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex, Unpack

from dist_ckpt import flags, policy
from dist_ckpt.engine.about import About
from dist_ckpt.engine.bests import with_bests
from dist_ckpt.engine.early import check_state, checked_metadata
from dist_ckpt.engine.exit import leave
from dist_ckpt.engine.handle import SaveHandle
from dist_ckpt.engine.job import Job, Place
from dist_ckpt.engine.job_ranks import JobRanks
from dist_ckpt.engine.load_options import LoadKeywords
from dist_ckpt.engine.metrics import Metrics
from dist_ckpt.engine.options import SaveKeywords, SaveOptions
from dist_ckpt.engine.origin import Origin
from dist_ckpt.engine.pace import Pace
from dist_ckpt.engine.report import LoadReport
from dist_ckpt.engine.resuming import Resumer
from dist_ckpt.engine.saving import Saver
from dist_ckpt.engine.starting import stoppers_of
from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import check_step, plain_step
from dist_ckpt.format.numbers import as_integer
from dist_ckpt.policy import SavePolicy
from dist_ckpt.repository import keep as keeping
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.state.train_state import TrainState

# What the constructor knows by name, to hint at when an option is mistyped.
_ARGUMENTS = ("every_steps", "when", "keep", "timeout_seconds", "metadata")


class Checkpointer:
    """Saves and restores the state of a training run.

    ::

        with Checkpointer("runs/17", state, every_steps=500, keep=keep.latest(3)) as ckpt:
            for step in range(ckpt.restore() + 1, total_steps + 1):
                loss = train_step()
                ckpt.step(step, metrics={"train/loss": loss})

    Every rank of the default process group makes the same calls in the same order. Leaving the
    `with` block finishes the save in flight.

    An `EarlyStopping` in the state is fed with the metrics that `step` and `epoch_end` are given;
    each time its metric gets better a save is made, and the best checkpoint is never deleted.

    Attributes:
        restored: what the last `restore` did, None before it and for a new run.
    """

    def __init__(
        self,
        url: Place,
        state: TrainState | Mapping[str, Any],
        *,
        every_steps: int | None = None,
        when: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        timeout_seconds: float = 1800.0,
        metadata: Mapping[str, Any] | None = None,
        **options: Unpack[SaveKeywords],
    ) -> None:
        """Describe the run; nothing is read or asked yet, host memory is prepared from here on.

        Args:
            url: the run: a path, a URL, or a `Store`.
            state: what to save and restore; a plain mapping of parts becomes a `TrainState`.
            every_steps: short for `when=policy.every(every_steps)`; both together add up.
            when: when `step` and `epoch_end` save, from `dist_ckpt.policy`; None for never.
            keep: which checkpoints to keep after each commit, from `dist_ckpt.keep`; None for all.
                The best by a metric of `when` or of an early stopping is kept in any case.
            timeout_seconds: after this long a save or a restore fails on every rank.
            metadata: any JSON, stored in every manifest. By convention `config` is how the training
                was configured, `phase` is "pretraining" or the like, `notes` are for people.
            **options: `staging`, `when_busy`, `memory_limit_bytes`, `check_replicas`, `command`:
                see `dist_ckpt.engine.options.SaveOptions`; `ranks`, `process_group`: see
                `dist_ckpt.engine.job_ranks.JobRanks`.

        Raises:
            UsageError: an argument is malformed, this one process's state holds what cannot be
                stored (several ranks hear of it together, at the restore or the first save), or
                there are several ranks and no process group.
        """
        train_state = TrainState.of(state)
        when = policy.checked(when)
        if every_steps is not None:
            when |= policy.every(every_steps)
        self._stoppers = stoppers_of(train_state)
        stopping = [stopper.criterion for stopper in self._stoppers]
        when, keep, criteria = with_bests(when, keep, stopping)
        self._job = Job(url, timeout_seconds=timeout_seconds, ranks=JobRanks.of(options))
        self._unfit = check_state(train_state, self._job.ranks)
        self._saver = Saver(
            self._job,
            train_state,
            keep=keep,
            metadata=checked_metadata(metadata),
            options=SaveOptions.of(options, besides=_ARGUMENTS),
        )
        self._program = Origin(command=options.get("command", False))
        self._resumer = Resumer(self._job, train_state, criteria)
        self._pace = Pace(self._job, when, best=self._best_saved)
        self._differing: set[str] = set()
        self._flags: flags.Flags | None = None
        self._told_step: int | None = None
        self._saved_step: int | None = None
        self._closed = False
        self._stepped = False
        self.restored: LoadReport | None = None
        self._saver.prewarm()

    @classmethod
    def from_args(
        cls,
        args: flags.Source,
        state: TrainState | Mapping[str, Any],
        *,
        when: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        metadata: Mapping[str, Any] | None = None,
        **options: Unpack[SaveKeywords],
    ) -> Self:
        """Make one as the flags of `dist_ckpt.flags` say; `restore()` then begins as they say.

        Args:
            args: what `flags.parse` takes: parsed arguments, a dict, or the path of a YAML file.
            state: see `Checkpointer`.
            when: when to save besides what the flags say.
            keep: what to keep besides what the flags say.
            metadata: see `Checkpointer`.
            **options: see `Checkpointer`.

        Raises:
            UsageError: a flag is malformed, or flags contradict each other.
        """
        said = flags.parse(args)
        kept = said.keep()
        both = kept if keep is None or kept is None else keeping.either(kept, keep)
        made = cls(
            said.checkpoint_dir,
            state,
            when=said.when() if when is None else said.when() | when,
            keep=keep if kept is None else both,
            metadata=metadata,
            **options,
        )
        made._flags = said
        return made

    @property
    def signaled(self) -> str:
        """The signal for which a save was made (`policy.on_signal`), "" for none: end the loop."""
        return self._pace.signaled

    def restore(
        self,
        which: Literal["newest", "best"] = "newest",
        *,
        step: SupportsIndex | None = None,
        url: Place | None = None,
        **options: Unpack[LoadKeywords],
    ) -> int:
        """Take the run over and restore the state in place; return the step to go on from.

        Without `step` and `url` that is the newest checkpoint, or the one before when it is
        damaged, and 0 for a new run (the state is then unchanged). `restored.refused` tells what
        was passed over.
        After `from_args` a call without arguments begins as the flags say.

        Args:
            which: "best" restores the best one, by the metric of an early stopping in the state,
                of `when=policy.better(...)`, or of `keep=keep.best(...)`, the first of these.
            step: restore exactly this one, with no falling back.
            url: restore from elsewhere, with no falling back: another run, one step directory of
                it, or what another program wrote; see `dist_ckpt.load`. The run that is taken over
                is this Checkpointer's own all the same.
            **options: `strict`, `only`, `skip`, `rename`, `cast`, `device`, `verify`, `exchange`,
                `in_flight_bytes`: see `dist_ckpt.engine.load_options.LoadOptions`. With
                `skip=["optimizer", "scheduler"]` training begins anew on the restored model.

        Raises:
            IncompatibleError: the checkpoint does not fit the state; nothing was changed.
            IntegrityError: every checkpoint (or the one asked for) is damaged.
            NotFound: `step` is not committed, or no checkpoint has the metric.
            UsageError: nobody said what the best is, or the flags begin a run that exists.
            CoordinationError: a rank failed or did not arrive.
            CheckpointError: the save before failed, and nobody was told yet.
        """
        self._check_open()
        step = None if step is None else plain_step(step)
        exact = step is not None or url is not None
        if which not in ("newest", "best") or (which == "best" and exact):
            raise UsageError(
                "restore takes 'newest' or 'best', or one of step= and url=, not "
                f"{which!r}, {step=}, {url=}"
            )
        failed = self._saver.settle() or self._unfit
        if which == "best":
            self.restored = self._resumer.best(failed, options=options)
        elif not exact and not options and self._flags is not None:
            self.restored = self._start(self._flags, failed)
        else:
            self.restored = self._resumer.own(step, failed, place=url, options=options)
        self._saver.prewarm()  # optimizers may have their state only now
        if self.restored is None:
            return 0
        if self._job.training.rank == 0 and (record := self._resumer.record(self.restored.step)):
            self._program.go_on(started=record.started, elapsed_seconds=record.elapsed_seconds)
        return self.restored.step

    def rollback(self) -> int:
        """Restore the models of the best checkpoint in place, on all ranks; return its step.

        Everything else stays as it is: optimizer, position in the data, counts of early stopping.

        Raises:
            UsageError: nobody said what the best is; see `restore`.
            NotFound: no checkpoint has the metric.
            CheckpointError: as for `restore`.
        """
        self._check_open()
        failed = self._saver.settle()
        return self._resumer.best(failed, model_only=True).step

    def step(self, step: SupportsIndex, *, metrics: Metrics | None = None) -> SaveHandle | None:
        """Tell that `step` is done: saves when due, see `save`; returns None otherwise.

        Args:
            step: the training step that the state stands after.
            metrics: numbers by name, stored in the manifest; those of rank 0 count for all ranks.
                A tensor is converted only when it is needed.
        """
        self._told_step = check_step(step)
        return self._tell(self._told_step, None, metrics or {})

    def epoch_end(
        self,
        epoch: SupportsIndex,
        *,
        metrics: Metrics | None = None,
        step: SupportsIndex | None = None,
    ) -> SaveHandle | None:
        """Tell that `epoch` is over: saves when due, see `save`; returns None otherwise.

        If its last step was saved by `step` a moment ago, that checkpoint is the epoch's: epoch
        and metrics are noted beside it. So evaluate before the last step is told where a restart
        must repeat every random number.

        Args:
            epoch: its number, stored in the manifest.
            metrics: as for `step`.
            step: the last step of the epoch. By default the one told last by `step`; where no
                steps are told, the epoch is the step.
        """
        number = as_integer(epoch)
        if number is None or number < 0:
            raise UsageError(f"an epoch is an integer from 0, not {epoch!r}")
        if step is None:
            step = number if self._told_step is None else self._told_step
        return self._tell(check_step(step), number, metrics or {})

    def save(self, step: SupportsIndex, *, metrics: Metrics | None = None) -> SaveHandle:
        """Save now; return as soon as the state may change again, the rest runs in the background.

        Args:
            step: the training step that the state stands after.
            metrics: numbers by name, stored in the manifest.

        Raises:
            CheckpointError: the save could not begin, or the one before failed and nobody was told
                yet; then this one is made all the same. The same on every rank.
            Exception: what the state of this rank raised, as it was; on other ranks it is a
                `CoordinationError`.
        """
        self._check_open()
        self._told_step = plain_step(step)
        return self._save(self._told_step, None, metrics or {}, "asked for")

    def wait(self) -> None:
        """Wait until the save in flight, and the retention after it, are over.

        Raises:
            CheckpointError: the save failed.
        """
        self._saver.drain()

    def close(self) -> None:
        """Finish the save in flight and release everything; a second call does nothing.

        Raises:
            CheckpointError: the save failed.
        """
        if not self._closed:
            self._closed = True
            self._pace.close()
            self._saver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._job.hurry()
        leave(self._saver, self.close, error)

    def _tell(self, step: int, epoch: int | None, metrics: Metrics) -> SaveHandle | None:
        self._check_open()
        verdict = self._pace.at(step, epoch, metrics)
        for stopper in self._stoppers:
            # Before the save: what is stored has seen this value.
            if stopper.criterion.metric in verdict.metrics:
                stopper.update(step, verdict.metrics[stopper.criterion.metric])
        if step == self._saved_step:
            if epoch is not None:
                self._saver.note_epoch(step, epoch, metrics)
            return None
        if verdict.reason:
            return self._save(step, epoch, metrics, verdict.reason)
        if not self._stepped:
            self._stepped = True
            self._saver.prewarm()  # some optimizers show only after a step what they keep
        return None

    def _save(self, step: int, epoch: int | None, metrics: Metrics, reason: str) -> SaveHandle:
        if self._job.training.rank == 0:
            self._program.look()
        about = About(
            reason, epoch, self._program, self._program.elapsed_seconds(), self._differing
        )
        handle = self._saver.start(step, metrics, about)
        if handle.outcome == "skipped":
            return handle
        self._saved_step = step
        self._pace.saved()
        if self._flags is not None and self._flags.no_async:
            handle.wait()
        # Last: who is told of the save before has this one all the same.
        self._saver.tell_earlier(step)
        return handle

    def _start(self, said: flags.Flags, failed: Exception | None) -> LoadReport | None:
        """Begin as the flags say."""
        place, reset = said.resume_from, said.reset_optimizer
        if place == flags.NEWEST:
            return self._resumer.existing(None, failed, reset_optimizer=reset)
        if isinstance(place, int):
            return self._resumer.existing(place, failed, reset_optimizer=reset)
        if isinstance(place, str):
            return self._resumer.elsewhere(place, reset_optimizer=reset)
        if not said.auto_resume:
            self._resumer.check_new("without --resume or --auto-resume this")
        report = self._resumer.own(None, failed)
        if report is None and said.pretrained_checkpoint is not None:
            self._resumer.weights(said.pretrained_checkpoint)
        return report

    def _best_saved(self, criteria: Sequence[Criterion]) -> dict[Criterion, float]:
        damaged = self._job.passed_over.steps  # nobody could go back to one of these
        records = [each for each in self._job.repository.records() if each.step not in damaged]
        ranked = {criterion: criterion.ranked(records) for criterion in criteria}
        return {criterion: criterion.of(found[0]) for criterion, found in ranked.items() if found}

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer is closed: make a new one to go on")
