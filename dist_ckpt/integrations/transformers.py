"""Hugging Face's `Trainer`, with its checkpoints in a run as everybody's.

`DistCkptTrainer` stands in the place of `transformers.Trainer`. The trainer of another library,
which is a subclass of that, takes the mixin: `class Mine(DistCkptMixin, SFTTrainer)`. How it is
used is told, and run, by docs/guides/transformers.md.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from dist_ckpt.errors import UsageError
from dist_ckpt.integrations.accelerate import state_of
from dist_ckpt.integrations.transformers_run import PART, LaterRng, TrainerRun
from dist_ckpt.integrations.transformers_start import TrainerStart
from dist_ckpt.integrations.versions import warn_if_untested
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place

__all__ = ["DistCkptMixin", "DistCkptTrainer"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Where transformers writes when nobody said.
_LOCAL = "trainer_output"

_log = logging.getLogger("dist_ckpt")

# Stands for the trainer that the mixin is put before.
_Base: Any = object


class _FoundBefore(Exception):
    """The checkpoint was trained with batches of another size, which fit into memory."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class DistCkptMixin(_Base):
    """Keeps the checkpoints of a `Trainer` in a run of dist_ckpt; put before it as a base.

    `TrainingArguments` say when to save, how many checkpoints stay and which is the best, as
    always. Every rank saves its share while training goes on, and when `train` is left, also by an
    exception, the save in flight is over.

    Args:
        *args: those of the trainer.
        checkpoint_url: the run: a path, a URL or a `Store`. By default it is `output_dir`, which
            may be a URL, too: what else a trainer writes then goes to a folder of that name in
            `trainer_output`.
        checkpoint_options: further keywords of `dist_ckpt.Checkpointer`, as `timeout_seconds`.
        **kwargs: those of the trainer.

    Raises:
        UsageError: `push_to_hub` wants folders at each save, which are not written here.
    """

    args: Any

    def __init__(
        self,
        *args: Any,
        checkpoint_url: Place | None = None,
        checkpoint_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._checkpoint_url = checkpoint_url or ""
        self._checkpoint_options = dict(checkpoint_options or {})
        self._start = TrainerStart()
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """See `Trainer`; here, as nothing was written to `output_dir` yet."""
        warn_if_untested("transformers", first="5.24", last="5.24")
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            raise UsageError(
                f"hub_strategy={str(self.args.hub_strategy.value)!r} pushes the folder of each "
                "checkpoint, and there is none: give hub_strategy='end', and call push_to_hub() "
                "after the training"
            )
        output_dir = self.args.output_dir
        self._checkpoint_url = self._checkpoint_url or output_dir
        if _URL.match(output_dir):
            # A copy: the caller's arguments still say where the run is.
            self.args = copy(self.args)
            self.args.output_dir = str(Path(_LOCAL, Path(output_dir).name))
        super().create_accelerator_and_postprocess()

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | int | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        discard_newer: bool = False,
    ) -> Any:
        """Train, from where it is said.

        Args:
            resume_from_checkpoint: True for the newest checkpoint that is whole, "auto" for a
                beginning where there is none, a step, or a path or URL: a step directory, another
                run, a folder that transformers itself wrote.
            trial: see `Trainer.train`.
            ignore_keys_for_eval: see `Trainer.train`.
            discard_newer: give up what the run has beyond that.

        Raises:
            NotFound: there is nothing to go on from.
            UsageError: the run has checkpoints that this training would leave behind.
            CheckpointError: a save or the restore failed.
        """
        self._start = TrainerStart.of(
            resume_from_checkpoint,
            self._checkpoint_url,
            output_dir=self.args.output_dir,
            discard_newer=discard_newer,
        )
        self._asks_for_batch = self.args.auto_find_batch_size
        self._steps_saved: set[int] = set()
        try:
            return super().train(self._start.folder, trial, ignore_keys_for_eval)
        finally:
            self._remove_empty_folders()

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # Entered once more, with smaller batches, where one did not fit into memory.
        self._evaluated: tuple[int, Mapping[str, object]] = (0, {})
        with ExitStack() as self._stack:
            try:
                return super()._inner_training_loop(batch_size, *args, **kwargs)
            except _FoundBefore as found:
                batch_size = found.size
        return self._inner_training_loop(batch_size, *args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        counts = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        self._trial_place = self._place_of(trial)
        position = super()._init_training_state(*counts, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None:
            return position
        # Prepared now and not by the next call: where the training stands follows from the
        # checkpoint that turns out to be whole, and to find out there must be what it fills.
        self._prepared_model, _ = super()._prepare_for_training(max_steps, None, None)
        stored = self._begin(max_steps)
        if stored is None:
            return position
        self._ask_for_batch(stored["train_batch_size"])
        self._run_now.compare(self._samples_a_step())
        with TemporaryDirectory() as folder:
            Path(folder, TRAINER_STATE_NAME).write_text(json.dumps(stored))
            position = super()._init_training_state(*counts, folder, trial)
        self.state.best_model_checkpoint = self._run_now.best_url
        # Not that of the checkpoint: `auto_find_batch_size` asks for what fitted at last.
        self.state.train_batch_size = self._train_batch_size
        return position

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if resume_from_checkpoint is None:
            self.callback_handler.train_dataloader = train_dataloader
            return self._prepared_model, train_dataloader
        found = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._begin(max_steps)
        self._run_now.go_on_from(self.state)
        _log.warning(
            "%s was written by transformers, which loaded it; from here on checkpoints go to %s, "
            "and are what a resume finds",
            resume_from_checkpoint,
            self._run_now.url,
        )
        return found

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._run_now.report is not None:
            # What makes it skip the batches that are done; no path of it is looked at.
            kwargs["resume_from_checkpoint"] = self._run_now.url
        super()._run_epoch(**kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._start.folder is not None:
            super()._load_rng_state(checkpoint)
        else:
            self._rng.set()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        callbacks = [*self.callback_handler.callbacks, self.control]
        stateful = [each for each in callbacks if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        step, metrics = self._evaluated
        self._steps_saved.add(self.state.global_step)
        self._run_now.save(
            self.state,
            samples=self._samples_a_step(),
            evaluated=metrics if step == self.state.global_step else {},
        )
        if self._start.folder is None:
            # Should the batches not fit into memory, what was saved until then counts.
            self._start = TrainerStart(newest=True, or_begin=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # An `evaluate` of somebody's own need not log what it returns.
        self._evaluated = (self.state.global_step, metrics)
        # Where the last step of an epoch is saved before the evaluation of the epoch.
        self._run_now.note(self.state, metrics)
        return bool(super()._determine_best_metric(metrics, trial))

    def _load_best_model(self) -> None:
        if not self._run_now.rollback():
            super()._load_best_model()  # a folder that transformers wrote

    def _finalize_training(self, *args: Any) -> Any:
        # With a limit of 1 transformers deletes folders of its own runs here, by a best checkpoint
        # that is none of them.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _begin(self, max_steps: int) -> dict[str, Any] | None:
        """Open the run and restore what was asked for; return the `TrainerState` that was saved."""
        self._rng = LaterRng()
        run = TrainerRun(
            self._trial_place,
            self._state_now(),
            self.args,
            max_steps=max_steps,
            options=self._checkpoint_options,
        )
        self._run_now = self._stack.enter_context(run)
        stored = run.restore(self._start)
        if self.args.save_strategy != SaveStrategy.NO and self.args.process_index == 0:
            run.put_beside(self._write_beside)
        return stored

    def _ask_for_batch(self, size: int | None) -> None:
        """Begin anew with the batch that `auto_find_batch_size` had found, where it is another.

        Only at first: should that one not fit any more, a smaller one is found.
        """
        asks, self._asks_for_batch = self._asks_for_batch, False
        if asks and size is not None and size != self._train_batch_size:
            raise _FoundBefore(size)

    def _state_now(self) -> TrainState:
        model = self.model_wrapped
        # As transformers decides it: of a model with adapters these alone are saved.
        adapters = bool(getattr(self.accelerator.unwrap_model(model), "peft_config", None))
        if self.args.save_only_model:
            return TrainState(model=model, trainable_only=adapters, rng=None, **{PART: {}})
        return state_of(
            self.accelerator,
            dataloaders=False,
            model=model,
            scheduler=self.lr_scheduler,
            rng=self._rng,
            trainable_only=adapters,
            **{PART: {}},
        )

    def _remove_empty_folders(self) -> None:
        """Remove the folder that `enable_jit_checkpoint` made for a save that went into the run.

        A later resume of transformers itself would take it for a checkpoint.
        """
        if self.args.enable_jit_checkpoint and self.args.should_save:
            for step in self._steps_saved:
                with suppress(OSError):  # there is none, or something is in it
                    Path(self._get_output_dir(None), f"{PREFIX_CHECKPOINT_DIR}-{step}").rmdir()

    def _write_beside(self, folder: str) -> None:
        """Write what `from_pretrained` wants besides weights, and the arguments."""
        model = self.accelerator.unwrap_model(self.model)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        adapters = getattr(model, "peft_config", None) or {}
        configs = [getattr(model, name, None) for name in ("config", "generation_config")]
        for each in (*configs, *adapters.values(), tokenizer):
            if hasattr(each, "save_pretrained"):
                each.save_pretrained(folder)
        Path(folder, "training_args.json").write_text(self.args.to_json_string())

    def _samples_a_step(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def _place_of(self, trial: Any) -> Place:
        below = os.path.relpath(self._get_output_dir(trial), self.args.output_dir)
        if below == ".":
            return self._checkpoint_url
        if isinstance(self._checkpoint_url, Store):
            raise UsageError(
                "each trial of a search has a run of its own, below checkpoint_url: give that as a "
                "path or a URL, and no Store"
            )
        return f"{os.fspath(self._checkpoint_url)}/{below}"


class DistCkptTrainer(DistCkptMixin, Trainer):
    """`transformers.Trainer` with its checkpoints in a run of dist_ckpt; see `DistCkptMixin`."""
