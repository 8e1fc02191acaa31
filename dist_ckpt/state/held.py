"""Whether what the optimizers of a state step is in the state at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch.nn.parameter import is_lazy

from dist_ckpt.errors import UsageError
from dist_ckpt.state.layout import address
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Part
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.values import ValuePart

_SHOWN = 5

_log = logging.getLogger("dist_ckpt")


def check_held(parts: Mapping[str, Part]) -> None:
    """Check that every parameter that an optimizer steps is in a part.

    What is in none would come back as the program made it, under moments of another parameter. An
    optimizer without any model or tensor beside it is a state of its own.

    Raises:
        UsageError: some are in no part; the message names them by group and place.
    """
    optimizers = {name: part for name, part in parts.items() if isinstance(part, OptimizerPart)}
    models = [part for part in parts.values() if isinstance(part, ModelPart)]
    if not optimizers:
        return
    held = {id(p) for model in models for p in model.module.parameters()}
    loose = {
        name: {where: p for where, p in _stepped(part) if id(p) not in held}
        for name, part in optimizers.items()
    }
    if not any(loose.values()):
        return
    # Only now: asking other parts for what they hold may be costly, and hardly ever is needed.
    memory = _memory(parts)
    if not models and not memory:
        _tell_alone(", ".join(loose))
        return
    for name, parameters in loose.items():
        lost = [w for w, p in parameters.items() if not is_lazy(p) and address(p) not in memory]
        if lost:
            rest = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            raise UsageError(
                f"part {name!r} steps parameters that are in no part of the state: "
                f"{', '.join(lost[:_SHOWN])}{rest}. Give what they belong to as a part (a second "
                "model, or the float32 copies as a list of tensors), and build the optimizer after "
                "the model is sharded, moved or replaced"
            )


@cache
def _tell_alone(names: str) -> None:
    # Some mean it so: told once, and not refused.
    _log.warning("%s: no model is in this state beside its optimizer", names)


def _is_per_rank(part: Part) -> bool:
    return isinstance(part, ValuePart) and part.per_rank


def _stepped(part: OptimizerPart) -> Iterator[tuple[str, torch.Tensor]]:
    for optimizer in part.optimizers:
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                yield f"group {i} parameter {j} of shape {_shape(parameter)}", parameter


def _shape(parameter: torch.Tensor) -> str:
    return "unknown" if is_lazy(parameter) else str(list(parameter.shape))


def _memory(parts: Mapping[str, Part]) -> set[tuple[int, int]]:
    """Return where the tensors of all parts but optimizers lie."""
    return {
        address(tensor)
        for part in parts.values()
        # What each rank has for itself may be a loader, which starts workers when it is asked.
        if not isinstance(part, OptimizerPart | RngPart) and not _is_per_rank(part)
        for tensor in part.capture().tensors.values()
    }
