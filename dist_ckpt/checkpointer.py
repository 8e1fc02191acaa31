"""The object of the training loop. Thin: it decides when, the engine does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, SupportsIndex, Unpack

from dist_ckpt import flags
from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import as_integer, check_step, plain_step
from dist_ckpt.loading.loader import LoadReport
from dist_ckpt.options import TIMEOUT_SECONDS, LoadKeywords
from dist_ckpt.policy import SavePolicy
from dist_ckpt.ranks.job import job_of_call
from dist_ckpt.repository import keep as keeping
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.saving.provenance import Metrics, as_given
from dist_ckpt.saving.saver import Saver, leave
from dist_ckpt.state.train_state import TrainState, stoppers_of
from dist_ckpt.storage.resolve import Place
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.early import (
    TrainingKeywords,
    TrainingOptions,
    as_said,
    check_state,
    checked_metadata,
)
from dist_ckpt.training.recorder import Recorder
from dist_ckpt.training.resuming import Resumer, begins_run, check_start, in_own_run
from dist_ckpt.training.start import Named, Start

# What the constructor knows by name, to hint at when an option is mistyped.
_ARGUMENTS = ("every_steps", "when", "keep", "timeout_seconds", "metadata", "save_last")


class Checkpointer:
    """Saves and restores the state of a training run.

    ```python
    import torch
    from dist_ckpt import Checkpointer, keep

    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer("runs/17", state, every_steps=500, keep=keep.latest(3)) as ckpt:
        for step in range(ckpt.restore() + 1, 1201):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step(step, metrics={"train/loss": loss})
    ```

    Every rank of the default process group makes the same calls in the same order. Leaving the
    `with` block saves the last step, and finishes the save in flight.

    An `EarlyStopping` in the state is fed with the metrics that `step` and `epoch_end` are given;
    each time its metric gets better a save is made, and the best checkpoint is never deleted.

    Attributes:
        restored: what the last `restore` did, None before it and for a new run.
    """

    _closed = False

    def __init__(
        self,
        url: Place,
        state: TrainState | Mapping[str, Any],
        *,
        every_steps: int | None = None,
        when: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        metadata: Mapping[str, Any] | None = None,
        save_last: bool = True,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        """Describe the run; nothing is read or asked yet, host memory is prepared from here on.

        Args:
            url: the run: a path, a URL, or a `Store`.
            state: what to save and restore; a plain mapping of parts becomes a `TrainState`.
            every_steps: short for `when=policy.every(every_steps)`; both together add up.
            when: when `step` and `epoch_end` save, from `dist_ckpt.policy`. Without both, and
                without an early stopping in the state, `save` alone saves; who calls `step` all the
                same says so by `policy.never()`.
            keep: which checkpoints to keep after each commit, from `dist_ckpt.keep`; None for all.
                The best by a metric of `when` or of an early stopping is kept in any case.
            timeout_seconds: after this long a save or a restore fails on every rank.
            metadata: any JSON, stored in every manifest. By convention `config` is how the training
                was configured, `phase` is "pretraining" or such, `notes` are for people.
            save_last: whether `close` saves the step told last, with the state as it is then, if
                no save of it was due. Not after an exception, nor without `every_steps` and `when`.
            **options: `when_failed`, `max_failures`, `exclusive`, `status_seconds`: see
                `TrainingOptions`; `staging`, `when_busy`, `memory_limit_bytes`, `check_replicas`,
                `command`: `SaveOptions`; `ranks`, `process_group`, `node_local`: `JobRanks`.

        Raises:
            UsageError: an argument is malformed, or ranks have no process group. Of `url`, `state`
                and `metadata` several ranks hear together, at the first save or restore.
        """
        chosen = TrainingOptions.of(options, besides=_ARGUMENTS)
        self._job, misplaced = job_of_call(
            url, chosen.ranks, timeout_seconds=timeout_seconds, exclusive=chosen.exclusive
        )
        train_state, said, refused = as_said(state, metadata, chosen.ranks)
        policies = SavePolicies.of(when, every_steps, keep, stoppers_of(train_state))
        self._saver = Saver(
            self._job,
            train_state,
            keep=policies.keep,
            metadata=said,
            options=chosen.saves,
            tolerance=chosen.tolerance,
        )
        self._resumer = Resumer(self._job, train_state, policies)
        self._recorder = Recorder(
            self._job, self._saver, self._resumer, policies, save_last=save_last, options=chosen
        )
        self._saver.refused = refused = misplaced or refused
        self._unfit = refused or check_state(train_state, chosen.ranks)
        self._flags: flags.Flags | None = None
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
        save_last: bool = True,
        **options: Unpack[TrainingKeywords],
    ) -> Self:
        """Make one as the flags of `dist_ckpt.flags` say; `restore()` then begins as they say.

        Args:
            args: what `flags.parse` takes: parsed arguments, a dict, or the path of a YAML file.
            state: see `Checkpointer`.
            when: when to save besides what the flags say.
            keep: what to keep besides what the flags say.
            metadata: see `Checkpointer`.
            save_last: see `Checkpointer`; both have to want it.
            **options: see `Checkpointer`.

        Raises:
            UsageError: a flag is malformed, or flags contradict each other.
        """
        said = flags.parse(args)
        kept = said.keep()
        # Both count: what either of them keeps stays.
        both = kept if keep is None or kept is None else keeping.either(kept, keep)
        made = cls(
            said.checkpoint_dir,
            state,
            when=said.when_besides(when),
            keep=keep if kept is None else both,
            metadata=metadata,
            save_last=save_last and not said.no_save_last,
            # What is said on the command line counts above what the program says.
            **{**options, **said.options()},
        )
        made._flags = said
        made._recorder.waits = said.no_async
        return made

    @property
    def signaled(self) -> str:
        """The signal that was heeded (`policy.on_signal`), "" for none: end the loop.

        It is "notice" after one of `policy.on_notice`.
        """
        return self._recorder.pace.signaled

    @property
    def exit_code(self) -> int:
        """With which status to end the program, so that a scheduler starts it again; else 0.

        After a signal that is 128 and its number, after a notice 143, or what the policy was given
        as `exit_code`: `sys.exit(ckpt.exit_code)` is the last line of a program.
        """
        return self._recorder.pace.exit_code

    def restore(
        self,
        which: Named = "newest",
        *,
        step: SupportsIndex | None = None,
        url: Place | None = None,
        discard_newer: bool = False,
        **options: Unpack[LoadKeywords],
    ) -> int:
        """Take the run over and restore the state in place; return the step to go on from.

        Without `step` and `url` that is the newest checkpoint, or the one before when it is
        damaged, and 0 for a new run (the state is then unchanged). `restored.refused` tells what
        was passed over.
        After `from_args` a call without arguments begins as the flags say.

        Another one than the newest is refused, because a restart would go on from those that are
        newer: give them up by `discard_newer`. A Checkpointer without `every_steps` and `when`, or
        one that saved the newer ones itself, may want to look: there the next step told or saved
        is refused, and the first of the two does not take the run over (docs/guides/policies.md).

        Args:
            which: "best" restores the best one, by the metric of an early stopping in the state,
                of `when=policy.better(...)`, or of `keep=keep.best(...)`, the first of these.
                "none" restores nothing: the training begins, and 0 is returned.
            step: restore exactly this one, with no falling back.
            url: restore from elsewhere, with no falling back: another run, one step directory of
                it, or what another program wrote; see `dist_ckpt.load`. The run that is taken over
                is this Checkpointer's own all the same. That is as none, a step of it as `step`.
            discard_newer: give up what is newer than the restored one, with "none" or `url` all of
                the run: hidden from now on, and deleted after the next commit.
            **options: `strict`, `only`, `skip`, `rename`, `cast`, `device`, `verify`, `exchange`,
                `in_flight_bytes`: see `dist_ckpt.options.LoadOptions`. With
                `skip=["optimizer", "scheduler"]` training begins anew on the restored model.

        Raises:
            IncompatibleError: the checkpoint does not fit the state; nothing was changed.
            IntegrityError: every checkpoint (or the one asked for) is damaged.
            NotFound: `step` is not committed, or no checkpoint has the metric.
            UsageError: nobody said what the best is, or the run has checkpoints that training
                would leave behind.
            CoordinationError: a rank failed or did not arrive.
            CheckpointError: the save before failed, and nobody was told yet.
        """
        self._check_open()
        wrong: Exception | None = None
        try:
            step = None if step is None else plain_step(step)
            start = Start(which=which, step=step, place=url, discard_newer=discard_newer)
            start = self._checked_start(start, options)
        except Exception as error:
            start, wrong = Start(), self._job.ranks.hold(error)
        self._recorder.begin()
        # It may be what is restored. That it failed, or the state is unfit, all hear in the round.
        failed = self._saver.settle(goes_on=True) or wrong or self._unfit
        # From here on the step told last is not that of the state any more: it must not be saved.
        with self._recorder.course.replaced():
            self.restored = self._resumer.restore(start, failed, options=options)
        self._recorder.restored(self.restored, own=not begins_run(start))
        return 0 if self.restored is None else self.restored.step

    def rollback(self) -> int:
        """Restore the models of the best checkpoint in place, on all ranks; return its step.

        Everything else stays as it is: optimizer, position in the data, counts of early stopping.
        `close` does not save the step told last any more: the state is another one.

        Raises:
            UsageError: nobody said what the best is (see `restore`), or no part is a module.
            NotFound: no checkpoint has the metric.
            CheckpointError: as for `restore`.
        """
        self._check_open()
        # The best may be in flight.
        failed = self._saver.settle(goes_on=True) or self._saver.refused
        with self._recorder.course.replaced():
            return self._resumer.rollback(failed).step

    def step(self, step: SupportsIndex, *, metrics: Metrics | None = None) -> SaveHandle | None:
        """Tell that `step` is done: saves when due, see `save`; returns None otherwise.

        Args:
            step: the training step that the state stands after.
            metrics: numbers by name, stored in the manifest; those of rank 0 count for all ranks.
                A tensor is converted only when it is needed.
        """
        return self._tell(check_step(step), None, as_given(metrics))

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
            told = self._recorder.course.told_step
            # Where steps are told, the number of an epoch would be far behind them.
            step = number if told is None else told
        return self._tell(check_step(step), number, as_given(metrics))

    def save(
        self,
        step: SupportsIndex,
        *,
        metrics: Metrics | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SaveHandle:
        """Save now; return as soon as the state may change again, the rest runs in the background.

        A step that this Checkpointer saved or restored is done: its handle is returned when that
        save is over, and nothing is saved.

        Args:
            step: the training step that the state stands after.
            metrics: numbers by name, stored in the manifest.
            metadata: any JSON, stored in the manifest of this save above that of the Checkpointer;
                what rank 0 gives counts.

        Raises:
            UsageError: the run has checkpoints, and `restore` was not called, or `metadata` is no
                JSON.
            CheckpointError: the save could not begin, or the one before failed and nobody was told
                yet; then this one is made all the same. The same on every rank.
            Exception: what the state of this rank raised, as it was; on other ranks it is a
                `CoordinationError`.
        """
        self._check_open()
        said: Mapping[str, Any] = {}
        numbers: Metrics = {}
        wrong: Exception | None = None
        try:
            said = {} if metadata is None else checked_metadata(metadata)
            numbers = as_given(metrics)
        except Exception as error:
            wrong = self._job.ranks.hold(error)
        return self._recorder.save(plain_step(step), numbers, said, wrong)

    def wait(self) -> None:
        """Wait until the save in flight, and the retention after it, are over.

        Raises:
            CheckpointError: the save failed.
        """
        self._saver.drain()

    def close(self) -> None:
        """Save the last step (see `save_last`), finish that, and release everything.

        While an exception is handled that came after the last step was told, in `finally` for
        example, that step is not saved: the state may be in the middle of the next. A second call
        does nothing.

        Raises:
            CheckpointError: a save failed.
        """
        if self._closed:
            return
        # First: also where this fails, a second call does nothing.
        self._closed = True
        well = False
        try:
            try:
                self._recorder.finish()
            # The last step was not saved, and what is in flight is finished all the same.
            except Exception:
                self._saver.close()
                raise
            # Not after an interrupt: it would be forgotten while the save is waited for.
            self._saver.close()
            well = True
        finally:
            # The status of the job tells by it whether it ended or failed.
            self._recorder.close(well=well)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            # Others may be in a collective that this rank will not join: they are not waited for.
            self._job.hurry()
            # The step told last may be half of the next by now: it is not saved.
            self._recorder.interrupted = True
        leave(self._saver, self.close, error)

    def _checked_start(self, start: Start, options: Mapping[str, Any]) -> Start:
        # A call that says anything itself counts above the flags.
        if self._flags is not None and start == Start() and not options:
            start = self._flags.start
        check_start(start, options)
        return in_own_run(start, self._job.repository.store)

    def _tell(self, step: int, epoch: int | None, metrics: Metrics) -> SaveHandle | None:
        self._check_open()
        return self._recorder.tell(step, epoch, metrics)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer is closed: make a new one to go on")
