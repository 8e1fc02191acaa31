"""What the engine does between a capture and a restore, in memory and without planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_ckpt.state.part import Captured, Part, Stored, Targets, TensorSpec


@dataclass(frozen=True)
class Saved:
    """The full values of one part at a moment."""

    tensors: dict[str, torch.Tensor]
    objects: Mapping[str, bytes]

    def stored(self, *, rank: int = 0, world_size: int = 1, saved: int = 1) -> Stored:
        """Return it as a part is shown it."""
        specs = {
            name: TensorSpec(str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in self.tensors.items()
        }
        return Stored(specs, self.objects, rank, world_size, saved)


def save(part: Part) -> Saved:
    """Copy everything that `part` captures; a collective where it holds DTensors."""
    captured = part.capture()
    return Saved({n: full(t) for n, t in captured.tensors.items()}, dict(captured.objects))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain copy of the whole of `tensor`."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load(part: Part, saved: Saved, *, world_size: int = 1) -> Targets:
    """Load `saved` into `part` where nothing is missing or unexpected."""
    stored = saved.stored(world_size=world_size, saved=world_size)
    targets = part.targets(stored)
    assert (targets.missing, targets.unexpected) == ([], [])
    for name, target in targets.tensors.items():
        value = saved.tensors[name]
        assert target.dtype == value.dtype
        assert target.shape == value.shape
        assert not target.requires_grad
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)
    part.restore(stored, targets.tensors)
    return targets


def assert_same(left: Captured | Saved, right: Captured | Saved) -> None:
    """Check that two captures have the same names and the same bits."""
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(full(tensor), full(other)), name
    assert left.objects == right.objects
