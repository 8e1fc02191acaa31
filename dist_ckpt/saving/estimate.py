"""How many bytes this rank will write, guessed from the live state before any save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import ASGD, Adadelta, Adagrad, Optimizer, RMSprop, Rprop

from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.train_state import TrainState

_HEADER_BYTES_PER_TENSOR = 256
# A little too much costs nothing; a little too little moves the memory and splits its huge pages.
SPARE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A guess of one rank's share.

    Attributes:
        nbytes: size of its files.
        devices: where the tensors are.
    """

    nbytes: int
    devices: frozenset[torch.device]


def estimate(state: TrainState, *, world_size: int) -> Estimate:
    """Guess this rank's share of a save of `state`; looks at shapes alone and asks nobody.

    What all ranks hold is shared out evenly, as the plan does it. An optimizer that has not stepped
    yet is taken to keep what its class keeps (two tensors for a parameter in the Adam family).
    Modules and optimizers count, other parts do not: they are small, or their size is not known
    without asking them for their state.

    Args:
        state: what is going to be saved.
        world_size: how many ranks save it together.
    """
    nbytes, devices = 0.0, set()
    with torch.no_grad():  # taking the local part of a DTensor is a graph operation otherwise
        for tensor, count in _tensors(state):
            local, holders = _local(tensor, world_size)
            nbytes += count * (local.nbytes / holders + _HEADER_BYTES_PER_TENSOR)
            devices.add(local.device)
    # Without tensors nothing goes through the arena.
    spare_bytes = SPARE_BYTES if devices else 0
    return Estimate(math.ceil(nbytes) + spare_bytes, frozenset(devices))


def _tensors(state: TrainState) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield tensors, each with the number of stored ones that are as large as it."""
    for part in state.parts.values():
        if isinstance(part, ModelPart):
            module = part.module
            # Both without repetition: a tied parameter is written once.
            for tensor in (*module.parameters(), *module.buffers()):
                if not is_lazy(tensor) and tensor.device.type != "meta":
                    yield tensor, 1
        elif isinstance(part, OptimizerPart):
            for optimizer in part.optimizers:
                yield from _optimizer_tensors(optimizer)


def _optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, int]]:
    # A wrapper may be no optimizer of torch's and have no state by that name.
    state: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for group in optimizer.param_groups:
        count = _moments(optimizer, group)
        for parameter in group["params"]:
            # By `get`, since reading an absent key would create it.
            kept = state.get(parameter)
            if isinstance(kept, dict) and kept:
                yield from ((value, 1) for value in kept.values() if torch.is_tensor(value))
            elif parameter.requires_grad and not is_lazy(parameter):
                yield parameter, count


def _moments(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """Return how many tensors of a parameter's size its first step will make."""
    count = 0
    if "betas" in group or isinstance(optimizer, Adadelta | Rprop):
        count = 2
    elif isinstance(optimizer, Adagrad | ASGD | RMSprop):
        count = 1
    return count + sum(bool(group.get(key)) for key in ("momentum", "amsgrad", "centered"))


def _local(tensor: torch.Tensor, world_size: int) -> tuple[torch.Tensor, int]:
    """Return what of `tensor` lies here, and how many ranks hold the same."""
    if not isinstance(tensor, DTensor):
        return tensor, world_size
    mesh = tensor.device_mesh
    holders = [mesh.size(dim) for dim, each in enumerate(tensor.placements) if each.is_replicate()]
    return tensor.to_local(), math.prod(holders)
