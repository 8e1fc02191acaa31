"""Stopping when a metric no longer gets better, as a part of the state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsIndex

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.format.names import as_integer, as_number, check_step
from dist_ckpt.repository.ranking import Criterion, Mode

_COUNTS = ("best_score", "best_step", "looks")


class EarlyStopping:
    """Tells when a metric has not become better for `patience` looks at it.

    As a part of the state it is fed by `Checkpointer.step` and `epoch_end`, with what rank 0 gives
    as `metrics`; it makes the best model be saved and kept, and its counts survive a restart:

    ```python
    import torch
    from dist_ckpt import Checkpointer, EarlyStopping, TrainState

    losses = [3.0, 1.0, 2.0, 2.5, 1.5, 0.5]
    stopper = EarlyStopping("val/loss", patience=3)
    state = TrainState(model=torch.nn.Linear(4, 1), early_stopping=stopper)
    with Checkpointer("runs/17", state) as ckpt:
        for epoch in range(ckpt.restore() + 1, len(losses) + 1):
            ckpt.epoch_end(epoch, metrics={"val/loss": losses[epoch - 1]})
            if stopper.should_stop:
                assert ckpt.rollback() == 2  # to the best model
                break
    ```

    A value that is NaN is a look at the metric that was no better. Where the metric is not given
    it was not looked at.

    Attributes:
        best_score: the best value so far, None before the first.
        best_step: the step that it was given for.
        looks: how many looks since then were no better.

    Args:
        metric: its name in the metrics.
        patience: how many looks without a better value are enough.
        min_delta: how much better a value must be to count.
        mode: "min" when smaller is better, "max" when larger is.

    Raises:
        UsageError: an argument is malformed.
    """

    def __init__(
        self, metric: str, *, patience: int, min_delta: float = 0.0, mode: Mode = "min"
    ) -> None:
        looks = as_integer(patience)
        if looks is None or looks < 1:
            raise UsageError(f"patience must be a positive integer, not {patience!r}")
        least = as_number(min_delta)
        if least is None or not 0 <= least < math.inf:
            raise UsageError(f"min_delta must be a finite number from 0, not {min_delta!r}")
        self.criterion = Criterion(metric, mode)
        self.patience = looks
        self.min_delta = least
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.looks = 0

    @property
    def should_stop(self) -> bool:
        """Whether `patience` looks in a row were no better than the best."""
        return self.looks >= self.patience

    def update(self, step: SupportsIndex, value: float) -> bool:
        """Take a look at the metric after `step`; return whether it is the best so far.

        Raises:
            UsageError: `step` is no step, or `value` no number.
        """
        number = check_step(step)
        try:
            score = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            name = self.criterion.metric
            raise UsageError(f"{name!r} after step {step} is {value!r}, not a number") from error
        if self.criterion.beats(score, self.best_score, min_delta=self.min_delta):
            self.best_score, self.best_step, self.looks = score, number, 0
            return True
        self.looks += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and by what they were made."""
        # Without patience and delta: the program may ask for others when it goes on.
        return {
            "metric": self.criterion.metric,
            "mode": self.criterion.mode,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "looks": self.looks,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take the counts that `state_dict` returned; patience and delta stay those of this object.

        Raises:
            IncompatibleError: they are of another metric, or no such counts.
        """
        self.check_state_dict(state_dict)
        self.best_score, self.best_step, self.looks = (state_dict[name] for name in _COUNTS)

    def check_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Check that `load_state_dict` would take `state_dict`; changes nothing.

        Raises:
            IncompatibleError: they are of another metric, or no such counts.
        """
        if not isinstance(state_dict, Mapping):
            raise IncompatibleError(f"no counts of an EarlyStopping: {state_dict!r}")
        saved = (state_dict.get("metric"), state_dict.get("mode"))
        if saved != (self.criterion.metric, self.criterion.mode):
            raise IncompatibleError(
                f"the saved early stopping looks at {saved[0]!r} ({saved[1]}), this one at "
                f"{self.criterion.metric!r} ({self.criterion.mode}): a best score of the one says "
                "nothing about the other"
            )
        absent = [name for name in _COUNTS if name not in state_dict]
        if absent:
            raise IncompatibleError(f"the saved early stopping has no {absent[0]!r}")
        score, step, looks = (state_dict[name] for name in _COUNTS)
        # Beside no best score there is no step of it.
        best = score is step is None or (
            type(score) in (int, float) and not math.isnan(score) and type(step) is int
        )
        if not best or type(looks) is not int or looks < 0:
            raise IncompatibleError(
                f"no counts of an EarlyStopping: best_score {score!r}, best_step {step!r}, "
                f"looks {looks!r}"
            )
