"""One small net and its AdamW in every layout that torch offers, with content that is known.

What a rank should hold is cut out by torch itself: a second net, filled with the wanted content
while it is whole, is given the same layout. Nothing of dist_ckpt takes part in that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dist_ckpt import TrainState
from tests.distributed.layouts import content, local, same_bits
from tests.older_torch import NOT_SENT

LAYOUTS: dict[str, int] = {
    "plain": 1,
    "ddp": 2,
    "tp": 2,
    "pipeline": 2,
    "fsdp3": 3,
    "fsdp": 4,
    "hsdp": 4,
    "tp_fsdp": 4,
}
"""Each layout, and the world size it is for."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LRS = (0.125, 0.75)


class Block(nn.Module):
    """A layer that can be cut by rows and by columns; no world size above 1 divides its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 7, bias=False)
        self.norm = nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what has the shape of `x`."""
        found: torch.Tensor = self.norm(self.down(self.up(x)))
        return found


class Net(nn.Module):
    """Two blocks, or the one that is a stage of a pipeline."""

    def __init__(self, kind: str, stages: tuple[str, ...] = ("0", "1")) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({stage: Block() for stage in stages})
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(content(f"{kind}.{name}", tuple(parameter.shape), torch.float32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what has the shape of `x`."""
        for block in self.blocks.values():
            x = block(x)
        return x


@dataclass
class Training:
    """A net in some layout, and what trains it."""

    net: Net
    model: nn.Module
    optimizer: torch.optim.AdamW

    @property
    def state(self) -> TrainState:
        """What a checkpoint of it is made of."""
        return TrainState(rng=None, model=self.model, optimizer=self.optimizer)


def laid_out(layout: str, kind: str) -> tuple[Net, nn.Module]:
    """Return a net whose content is that of `kind`, and what `layout` makes of it."""
    if layout == "pipeline":
        net = Net(kind, (str(dist.get_rank()),))
        return net, net
    net = Net(kind)
    if layout == "ddp":
        # It would send the content of rank 0, which all have anyway.
        return net, DistributedDataParallel(net, **NOT_SENT)
    if layout.startswith("fsdp"):
        _shard(net, _mesh(dist.get_world_size()))
    elif layout == "hsdp":
        _shard(net, _mesh(2, 2))
    elif layout == "tp":
        _cut(net, _mesh(2))
    elif layout == "tp_fsdp":
        mesh = _mesh(2, 2)
        _cut(net, mesh["inner"])
        _shard(net, mesh["outer"])
    return net, net


@functools.cache  # each new one makes process groups
def _mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def _shard(net: Net, mesh: DeviceMesh) -> None:
    for block in net.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _cut(net: Net, mesh: DeviceMesh) -> None:
    for block in net.blocks.values():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def build(layout: str) -> Training:
    """Return a training in `layout` with the known content."""
    net, model = laid_out(layout, "value")
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "lr": _LRS[0]},
        {"params": [p for p in named.values() if p.ndim == 1], "lr": _LRS[1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.75))
    moments = {key: dict(laid_out(layout, key)[0].named_parameters()) for key in _MOMENTS}
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(17.0),
            **{key: found[name].detach() for key, found in moments.items()},
        }
    return Training(net, model, optimizer)


def clear(training: Training) -> None:
    """Make `training` a new one, with other options."""
    with torch.no_grad():
        for parameter in training.net.parameters():
            local(parameter).zero_()
    training.optimizer.state.clear()
    for group in training.optimizer.param_groups:
        group.update(lr=9.0, weight_decay=9.0, betas=(0.0, 0.0))


def differences(found: Training, expected: Training) -> Iterator[str]:
    """Name what of `found` is not, bit for bit, what it is in `expected`."""
    options = [_options(training) for training in (found, expected)]
    if options[0] != options[1]:
        yield f"options {options[0]}"
    yield from weight_differences(found.net, expected.net)
    wanted = dict(expected.net.named_parameters())
    for name, parameter in found.net.named_parameters():
        state = found.optimizer.state.get(parameter, {})
        like = expected.optimizer.state[wanted[name]]
        if state.keys() != like.keys():
            yield f"{name} has {sorted(state)}"
        yield from (f"{name}.{key}" for key in state if not _alike(state[key], like[key]))


def weight_differences(found: Net, expected: Net) -> Iterator[str]:
    """Name the parameters of `found` that are not, bit for bit, what they are in `expected`."""
    wanted = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        if not _alike(parameter, wanted[name]):
            yield name


def _options(training: Training) -> list[dict[str, Any]]:
    groups = training.optimizer.param_groups
    return [{key: group[key] for key in group if key != "params"} for group in groups]


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if isinstance(found, DTensor) and isinstance(expected, DTensor):
        if found.placements != expected.placements or found.shape != expected.shape:
            return False
        return same_bits(found.to_local(), expected.to_local())
    return type(found.detach()) is type(expected.detach()) and same_bits(found, expected)
