"""How a training begins: which parts of a state are what, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Literal, SupportsIndex, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import plain_step
from dist_ckpt.repository import Repository, ranking
from dist_ckpt.repository.ranking import Criterion, Measured, Mode
from dist_ckpt.state.early_stopping import EarlyStopping
from dist_ckpt.state.optimizer_faces import holds_optimizers
from dist_ckpt.state.several import holds_modules
from dist_ckpt.state.train_state import TrainState

Role: TypeAlias = Literal["model", "optimizer", "scheduler", "other"]


def parts_of(state: TrainState, *roles: Role) -> list[str]:
    """Return the names of the parts that are of one of `roles`."""
    return [name for name in state if _role(state[name]) in roles]


def stoppers_of(state: TrainState) -> list[EarlyStopping]:
    """Return the early stoppings among the parts."""
    return [value for name in state if isinstance(value := state[name], EarlyStopping)]


def main_model(state: TrainState) -> str:
    """Return the name of the model that given weights are for.

    Raises:
        UsageError: none is called `model`, and there is not exactly one.
    """
    models = parts_of(state, "model")
    if "model" in models:
        return "model"
    if len(models) != 1:
        raise UsageError(
            f"weights are for one model, and the state has {', '.join(models) or 'none'}: call one "
            "of the parts 'model'"
        )
    return models[0]


def best_step(records: Sequence[Measured], criteria: Sequence[Criterion], *, where: str) -> int:
    """Return the step of the best checkpoint by the first of `criteria`.

    Raises:
        UsageError: there is no criterion.
        NotFound: no checkpoint has its metric.
    """
    if not criteria:
        raise UsageError(
            "which checkpoint is the best? Say by which metric: put an EarlyStopping into the "
            "state, or give when=policy.better(...) or keep=keep.best(...)"
        )
    return ranking.best_among(records, criteria[0], where=where).step


def which_of(
    step: SupportsIndex | Literal["best"] | None,
    metric: str | None,
    mode: Mode,
    criteria: Sequence[Criterion] = (),
) -> int | Criterion | None:
    """Return which checkpoint is meant by the arguments of a call that only reads.

    Args:
        step: its number, "best", or None for the newest.
        metric: by what it is the best.
        mode: whether small or large values of that are good.
        criteria: what else says what the best is, where `metric` does not.

    Raises:
        UsageError: nobody says what the best is, or what is said is of no use.
    """
    if isinstance(step, str) and step != "best":
        raise UsageError(f"bad step {step!r}: a step is a number or 'best'")
    if step != "best":
        if metric is not None or mode != "min":
            raise UsageError("metric= and mode= say what the best is: give step='best' with them")
        return None if step is None else plain_step(step)
    if metric is not None:
        return Criterion(metric, mode)
    if not criteria:
        raise UsageError("by which metric is it the best? Give metric='val/loss', say")
    return criteria[0]


def best_of(run: Repository, criterion: Criterion) -> int:
    """Return the step of the best checkpoint of `run`, which is read and not taken over.

    Raises:
        NotFound: there is no run, or no checkpoint has the metric.
    """
    records = run.records()
    if not records and run.latest() is None:
        raise run.no_checkpoint()
    return best_step(records, [criterion], where=run.store.url)


@singledispatch
def _role(value: object) -> Role:
    # By what it looks like: a wrapper, or a list of modules or optimizers, has no class to go by.
    if holds_modules(value):
        return "model"
    return "optimizer" if holds_optimizers(value) else "other"


@_role.register
def _(value: nn.Module) -> Role:
    return "model"


@_role.register
def _(value: Optimizer) -> Role:
    return "optimizer"


@_role.register
def _(value: LRScheduler) -> Role:
    return "scheduler"
