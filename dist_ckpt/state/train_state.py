"""The state of a training run: named parts, found by what they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import check_part
from dist_ckpt.state.generators import GeneratorPart
from dist_ckpt.state.held import check_held
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.optimizer_faces import holds_optimizers
from dist_ckpt.state.part import Part
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.scheduler import SchedulerPart
from dist_ckpt.state.values import Reshard, Stateful, StatefulPart, ValuePart


@dataclass(frozen=True)
class PerRank:
    """Marks a value as each rank's own: kept apart by rank, never taken for replicas.

    `value` is anything with a state dict, or a plain value. Tensors in it are stored with the
    value, so it should be small. At the world size that saved it each rank gets its own back. At
    another one `reshard` is asked, or the method `reshard` of `value` if it has one; without
    either the load fails and names the part.

    Attributes:
        value: what to keep.
        reshard: called as `reshard(saved, rank, world_size)` with what each rank saved, in the
            order of ranks; returns what this rank, now one of `world_size`, goes on with.
    """

    value: object
    reshard: Reshard | None = None


class GlobalRng:
    """Stands for the random number generators of the process: what `TrainState(rng=)` is."""


class TrainState:
    """What a checkpoint holds and a restore brings back, as named parts.

    ::

        TrainState(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler,
                   history=[], worker=PerRank({"shard": 3}))

    Modules and optimizers become parts whose tensors are shared out between ranks. Anything else
    with `state_dict` and `load_state_dict` is asked for its state, and every other value is
    stored as it is. Several modules and several optimizers are fine: an optimizer finds the names
    of its parameters in all of them. Random number generators and loaders with a state of their
    own (torchdata's `StatefulDataLoader`) are kept per rank.

    Args:
        rng: by default the generators of Python, numpy, torch and every CUDA device; None leaves
            them out.
        trainable_only: keep of every module only the parameters that require gradients, and the
            buffers of the submodules that own one: for adapters on a frozen base.
        parts: by name: a letter or `_`, then letters, digits, `_` or `-`, at most 64.

    Raises:
        UsageError: a bad name, or a value that cannot be the part it is asked to be.
    """

    def __init__(
        self, /, *, rng: object = GlobalRng(), trainable_only: bool = False, **parts: object
    ) -> None:
        if not isinstance(trainable_only, bool):
            raise UsageError("trainable_only is an option, True or False: call the part otherwise")
        self._values = dict(parts)
        if rng is not None:  # leaving the generators out must be said, never forgotten
            self._values["rng"] = rng
        self._parts: dict[str, Part] = {}
        models: list[ModelPart] = []
        # Optimizers take names from models; the generators come last, as restoring may draw.
        for name, value in sorted(self._values.items(), key=lambda item: _turn(item[1])):
            part = _part_of(value, check_part(name), models)
            if trainable_only and isinstance(value, nn.Module):
                part = ModelPart(value, name=name, trainable_only=True)
            self._parts[name] = part
            if isinstance(part, ModelPart):
                models.append(part)
        check_held(self._parts)

    @classmethod
    def of(cls, state: TrainState | Mapping[str, object]) -> TrainState:
        """Return `state` if it is a `TrainState`, and one made of its items if it is a mapping.

        Raises:
            UsageError: neither, or names that no part can have.
        """
        if isinstance(state, TrainState):
            return state
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise UsageError(
                f"a state is a TrainState or a dict of parts by name, not {type(state).__name__}"
            )
        parts: dict[str, Any] = dict(state)
        return cls(**parts)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in the order to restore: models, optimizers, others, generators."""
        return dict(self._parts)

    def __iter__(self) -> Iterator[str]:
        """Return the names of the parts."""
        return iter(self._parts)

    def __getitem__(self, name: str) -> Any:
        """Return the live value of a part: what was given, or what a restore put in its place.

        Raises:
            KeyError: no such part.
        """
        part = self._parts[name]
        # Only a plain value may be another object after a restore.
        return part.value if isinstance(part, ValuePart) else self._values[name]

    def __setitem__(self, name: str, value: object) -> None:
        """Give a plain value a new one; the next save stores that.

        Raises:
            KeyError: no such part.
            UsageError: the part is not a plain value.
        """
        part = self._parts[name]
        if type(part) is not ValuePart:
            kind = type(self[name]).__qualname__
            raise UsageError(
                f"part {name!r} is a {kind}, not a plain value: build a new TrainState"
            )
        part.value = value


@singledispatch
def _part_of(value: object, name: str, models: Sequence[ModelPart]) -> Part:
    # Protocols, which dispatch by class cannot see. A part is taken as it is.
    if isinstance(value, Part):
        return value
    if holds_optimizers(value):
        return OptimizerPart(value, models=models, name=name)
    if isinstance(value, Stateful):
        return StatefulPart(value, name=name)
    return ValuePart(value, name=name)


@_part_of.register
def _(value: nn.Module, name: str, models: Sequence[ModelPart]) -> Part:
    return ModelPart(value, name=name)


@_part_of.register
def _(value: Optimizer, name: str, models: Sequence[ModelPart]) -> Part:
    return OptimizerPart(value, models=models, name=name)


@_part_of.register
def _(value: LRScheduler, name: str, models: Sequence[ModelPart]) -> Part:
    return SchedulerPart(value, name=name)


@_part_of.register
def _(value: GlobalRng, name: str, models: Sequence[ModelPart]) -> Part:
    return RngPart(name=name)


@_part_of.register
def _(value: PerRank, name: str, models: Sequence[ModelPart]) -> Part:
    # What is shared out between ranks has no copy of its own on each.
    inner = value.value
    if isinstance(inner, (nn.Module, Part, PerRank)) or holds_optimizers(inner):
        kind = type(inner).__qualname__
        raise UsageError(
            f"part {name!r}: a {kind} cannot be PerRank; give it as it is, or keep the values "
            "that differ between ranks in a dict of their own"
        )
    reshard = value.reshard or getattr(inner, "reshard", None)
    if isinstance(inner, Stateful):
        return StatefulPart(inner, name=name, per_rank=True, reshard=reshard)
    return ValuePart(inner, name=name, per_rank=True, reshard=reshard)


@_part_of.register
def _(value: DataLoader, name: str, models: Sequence[ModelPart]) -> Part:  # type: ignore[type-arg]
    if not isinstance(value, Stateful):
        raise UsageError(
            f"part {name!r}: a plain DataLoader has no position to keep; give the ElasticSampler "
            "that it draws from, or use torchdata's StatefulDataLoader"
        )
    # Each rank is somewhere else in its own share of the data.
    return _part_of(PerRank(value), name, models)


@_part_of.register
def _(
    value: np.random.Generator | np.random.RandomState | torch.Generator | random.Random,
    name: str,
    models: Sequence[ModelPart],
) -> Part:
    return GeneratorPart(value, name=name)


@singledispatch
def _turn(value: object) -> int:
    if holds_optimizers(value):
        return 1
    return 2  # schedulers, samplers, values


@_turn.register
def _(value: nn.Module | ModelPart) -> int:
    return 0


@_turn.register
def _(value: Optimizer | OptimizerPart) -> int:
    return 1


@_turn.register
def _(value: GlobalRng | RngPart | GeneratorPart) -> int:
    return 3


@_turn.register
def _(
    value: np.random.Generator | np.random.RandomState | torch.Generator | random.Random,
) -> int:
    return 3
