"""The state of a training run: named parts, found by what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import check_part
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Part
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.values import Stateful, StatefulPart, ValuePart


@dataclass(frozen=True)
class PerRank:
    """Marks a value as each rank's own: kept apart by rank, never taken for replicas.

    `value` is anything with a state dict, or a plain value. Tensors in it are stored with the
    value, so it should be small. It loads at the world size that saved it, and no other.
    """

    value: object


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
    of its parameters in all of them.

    Args:
        rng: by default the generators of Python, numpy, torch and every CUDA device; None leaves
            them out.
        parts: by name: a letter or `_`, then letters, digits, `_` or `-`, at most 64.

    Raises:
        UsageError: a bad name, or a value that cannot be the part it is asked to be.
    """

    def __init__(self, /, *, rng: object = GlobalRng(), **parts: object) -> None:
        self._values = dict(parts)
        if rng is not None:  # leaving the generators out must be said, never forgotten
            self._values["rng"] = rng
        self._parts: dict[str, Part] = {}
        models: list[ModelPart] = []
        # Optimizers take names from models; the generators come last, as restoring may draw.
        for name, value in sorted(self._values.items(), key=lambda item: _turn(item[1])):
            part = _part_of(value, check_part(name), models)
            self._parts[name] = part
            if isinstance(part, ModelPart):
                models.append(part)

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
        return cls(**state)

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
    # Two protocols, which dispatch by class cannot see. A part is taken as it is.
    if isinstance(value, Part):
        return value
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
def _(value: GlobalRng, name: str, models: Sequence[ModelPart]) -> Part:
    return RngPart(name=name)


@_part_of.register
def _(value: PerRank, name: str, models: Sequence[ModelPart]) -> Part:
    # What is shared out between ranks has no copy of its own on each.
    inner = value.value
    if isinstance(inner, (nn.Module, Optimizer, Part, PerRank)):
        kind = type(inner).__qualname__
        raise UsageError(
            f"part {name!r}: a {kind} cannot be PerRank; give it as it is, or keep the values "
            "that differ between ranks in a dict of their own"
        )
    if isinstance(inner, Stateful):
        return StatefulPart(inner, name=name, per_rank=True)
    return ValuePart(inner, name=name, per_rank=True)


@singledispatch
def _turn(value: object) -> int:
    return 2  # schedulers, samplers, values


@_turn.register
def _(value: nn.Module | ModelPart) -> int:
    return 0


@_turn.register
def _(value: Optimizer | OptimizerPart) -> int:
    return 1


@_turn.register
def _(value: GlobalRng | RngPart) -> int:
    return 3
