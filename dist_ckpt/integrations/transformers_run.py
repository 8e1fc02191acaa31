"""The checkpoints of one training of a `Trainer`: what is kept, saved, restored and told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import SaveStrategy

from dist_ckpt import policy
from dist_ckpt.checkpointer import Checkpointer
from dist_ckpt.errors import UsageError, describe
from dist_ckpt.format.names import STEP_LIMIT, step_dir
from dist_ckpt.integrations.begun import told_by_its_parts
from dist_ckpt.integrations.transformers_start import TrainerStart
from dist_ckpt.loading.loader import LoadReport
from dist_ckpt.repository import keep
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.keep import Keep, KeepPolicy
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.run import Run
from dist_ckpt.state.part import Stored
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place, resolve

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

PART = "trainer"
"""The part that holds what the trainer knows: its `TrainerState`, as a dict."""

BESIDE = "hf"
"""The folder of a run with what `from_pretrained` wants beside the weights."""

# Each process says these of itself.
_OF_THIS_PROCESS = ("is_local_process_zero", "is_world_process_zero")
# `TrainingArguments` decide these.
_SAID = {"when", "every_steps", "save_last"}

# What is logged beside metrics: where the training stood, and how long an evaluation took.
_NO_METRICS = ("step", "epoch", "_runtime", "_per_second")

_log = logging.getLogger("dist_ckpt")


class LaterRng(RngPart):
    """The random number generators, which a restore sets only when it is asked for.

    The trainer draws from them while it skips the batches of the epoch that are done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stored: Stored | None = None

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what is stored."""
        self._stored = stored

    def set(self) -> None:
        """Set the generators to what was restored, if anything was.

        Raises:
            IncompatibleError: see `RngPart.restore`.
        """
        stored, self._stored = self._stored, None
        if stored is not None:
            super().restore(stored, {})


@dataclass(frozen=True, slots=True)
class TotalLimit(Keep):
    """Keeps as many checkpoints as `save_total_limit` says, the best one among them."""

    count: int
    criterion: Criterion | None

    def __str__(self) -> str:
        return f"save_total_limit={self.count}"

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        """Return the newest, the best, and of the others the newer ones."""
        steps = sorted((record.step for record in records), reverse=True)
        best = [] if self.criterion is None else self.criterion.ranked(records)[:1]
        first = [*steps[:1], *(record.step for record in best)]
        order = list(dict.fromkeys([*first, *steps]))
        # The newest and the best stay, also where the limit is 1.
        count = max(self.count, len(set(first)))
        return dict.fromkeys(order[:count], f"{self} (the newest and the best first)")


def criterion_of(args: TrainingArguments) -> Criterion | None:
    """Return by what a checkpoint is the best, None where nothing was said."""
    metric = args.metric_for_best_model
    if metric is None:
        return None
    # As transformers completes it: what an evaluation gives is logged so.
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return Criterion(name, "max" if args.greater_is_better else "min")


def keep_of(args: TrainingArguments, besides: KeepPolicy | None = None) -> KeepPolicy:
    """Return what `save_total_limit` and `metric_for_best_model` keep, and what else is wanted."""
    criterion = criterion_of(args)
    limit = args.save_total_limit
    kept: KeepPolicy = besides or keep.all()
    if limit is not None and limit > 0:
        limited = TotalLimit(limit, criterion)
        kept = limited if besides is None else keep.either(limited, besides)
    if criterion is not None:  # said for `rollback`, too
        kept = keep.either(kept, keep.best(criterion.metric, mode=criterion.mode))
    return kept


class TrainerRun:
    """A `Checkpointer`, as long as a trainer trains; left as a `with` block.

    Attributes:
        url: where the run is.
        report: what was restored, None where the training began.
    """

    def __init__(
        self,
        place: Place,
        state: TrainState,
        args: TrainingArguments,
        *,
        max_steps: int,
        options: Mapping[str, Any],
    ) -> None:
        """Describe the run.

        Args:
            place: where it is.
            state: what is saved; its part `PART` is a dict.
            args: what says when to save and what to keep.
            max_steps: how many steps the training has.
            options: further keywords of the Checkpointer.

        Raises:
            UsageError: an option is none, or one that `args` say.
        """
        said = sorted(_SAID & options.keys())
        if said:
            raise UsageError(f"checkpoint_options has {said}, which TrainingArguments say")
        self.url = Run(place).url
        self.report: LoadReport | None = None
        self._place = place
        self._saves = args.save_strategy != SaveStrategy.NO
        self._criterion = criterion_of(args)
        # Its step, or the folder that transformers wrote, and its metric.
        self._best: tuple[int | str, float] | None = None
        self._saved: int | None = None
        self._state = state
        self._checkpointer = Checkpointer(
            place,
            state,
            # Nothing is told step by step: this says that the run is one that is trained in, so
            # that a start which would leave checkpoints behind is refused at once.
            when=policy.last(min(max_steps, STEP_LIMIT - 1)) if self._saves else policy.never(),
            keep=keep_of(args, options.get("keep")),
            metadata={**_told_of(args), **(options.get("metadata") or {})},
            save_last=False,
            **{name: each for name, each in options.items() if name not in ("keep", "metadata")},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpointer.__exit__(*error)

    def restore(self, start: TrainerStart) -> dict[str, Any] | None:
        """Restore what `start` says, all but the generators; return the `TrainerState` as a dict.

        Raises:
            CheckpointError: see `TrainerStart.restore`.
        """
        place = self._place if start.place is None else start.place
        with told_by_its_parts(place, start.step, own=PART, trainer="transformers"):
            self.report = start.restore(self._checkpointer)
        if self.report is None:
            return None
        told = self._state[PART]
        # Of another run the best one does not lie in this one.
        self._best = None if start.place is not None else told["best"]
        # Which one that is is said by `best_url`: transformers looks for a local folder.
        return dict(told["state"], best_model_checkpoint=None)

    def compare(self, samples: int) -> None:
        """Say so where all ranks together take another number of samples in one step than before.

        For a training that was restored.
        """
        told = self._state[PART]["samples"]
        if self.report is not None and told != samples:
            _log.warning(
                "step %d of %s was trained with %d samples a step, and the training goes on with "
                "%d: a Trainer counts its position in steps, so samples of this epoch are repeated "
                "or left out; keep ranks x batch size x accumulation as it was",
                self.report.step,
                self.report.url,
                told,
                samples,
            )

    def go_on_from(self, state: TrainerState) -> None:
        """Take note of the best checkpoint of a training that transformers itself resumed."""
        if state.best_model_checkpoint is not None and state.best_metric is not None:
            self._best = (state.best_model_checkpoint, state.best_metric)

    def save(self, state: TrainerState, *, samples: int, evaluated: Mapping[str, object]) -> None:
        """Save after the step that `state` counts; it gets to know which checkpoint is the best.

        Args:
            state: what the trainer knows.
            samples: how many samples all ranks together take in one step.
            evaluated: what an evaluation after this step gave, whether that was logged or not.

        Raises:
            CheckpointError: see `Checkpointer.save`.
        """
        own = {name: each for name, each in asdict(state).items() if name not in _OF_THIS_PROCESS}
        # Times that an evaluation took are in it, so no two ranks have the same.
        shared, given = broadcast_object_list([own, _numbers_of(evaluated)])
        step = state.global_step
        metrics = {**_logged_at(step, shared["log_history"]), **given}
        self._rank(step, metrics)
        state.best_model_checkpoint = shared["best_model_checkpoint"] = self.best_url
        self._state[PART] = {"state": shared, "samples": samples, "best": self._best}
        self._checkpointer.save(step, metrics=metrics)
        # `note` asks for it: the last step of an epoch is saved before the evaluation.
        self._saved = step

    def note(self, state: TrainerState, evaluated: Mapping[str, object]) -> None:
        """Note what an evaluation gave of the step that `state` counts, if that was saved before.

        Raises:
            CheckpointError: see `Checkpointer.epoch_end`.
        """
        step = state.global_step
        if step == self._saved:
            (metrics,) = broadcast_object_list([_numbers_of(evaluated)])
            self._rank(step, metrics)
            self._checkpointer.epoch_end(round(state.epoch or 0), metrics=metrics, step=step)

    def _rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the checkpoint of `step` for the best if its metric is."""
        if self._criterion is not None and self._criterion.metric in metrics:
            value = metrics[self._criterion.metric]
            if self._criterion.beats(value, None if self._best is None else self._best[1]):
                self._best = (step, value)

    @property
    def best_url(self) -> str | None:
        """Where the best of the checkpoints is that were saved."""
        if self._best is None:
            return None
        best = self._best[0]
        return best if isinstance(best, str) else f"{self.url}/{step_dir(best)}"

    def rollback(self) -> bool:
        """Restore the model of the best checkpoint alone; False where that is not in the run.

        Raises:
            CheckpointError: see `Checkpointer.rollback`.
        """
        own = self._best is None or not isinstance(self._best[0], str)
        if own:
            self._checkpointer.rollback()
        return own

    def put_beside(self, write: Callable[[str], None]) -> None:
        """Put what `write` leaves in a folder into the run, for `from_pretrained`.

        The checkpoints need none of it: a failure is told, and no training ends by it.
        """
        store = self._place if isinstance(self._place, Store) else resolve(self._place)
        try:
            with TemporaryDirectory() as folder:
                write(folder)
                for file in filter(Path.is_file, sorted(Path(folder).rglob("*"))):
                    key = f"{BESIDE}/{file.relative_to(folder).as_posix()}"
                    store.put(key, [file.read_bytes()], mode="replace")
        except Exception as error:  # transformers refuses to write some configurations
            text = describe(error)
            _log.warning("%s/%s is not as this training has it: %s", self.url, BESIDE, text)


def _told_of(args: TrainingArguments) -> dict[str, Any]:
    """Return what every manifest says of the training; tokens are masked by transformers."""
    return {"config": json.loads(args.to_json_string()), "transformers": version("transformers")}


def _logged_at(step: int, logs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers that were logged after `step`."""
    numbers: dict[str, float] = {}
    # From the end, where those of this step are.
    for entry in reversed(logs):
        if entry.get("step") != step:
            break
        numbers = {**_numbers_of(entry), **numbers}
    return numbers


def _numbers_of(entry: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in entry.items()
        if isinstance(value, Real) and not name.endswith(_NO_METRICS)
    }
