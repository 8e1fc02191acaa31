"""A small tensor of several: what quantizing libraries have, without their time to be imported."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from dist_ckpt.state.spread import pieces

PARTS = ("codes", "scale", "mean")


class Scaled(torch.Tensor):
    """Rows of numbers, a scale for each row, and one mean of all; can be cut by rows."""

    @staticmethod
    def __new__(
        cls: Any, codes: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, bits: int = 8
    ) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale, made.mean, made.bits = codes, scale, mean, bits
        return made

    def __tensor_flatten__(self: Any) -> tuple[list[str], int]:
        return list(PARTS), self.bits

    @classmethod
    def __tensor_unflatten__(cls: Any, inner: Any, bits: int, size: Any, stride: Any) -> Any:
        return cls(*(inner[name] for name in PARTS), bits)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scaled({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, whole = func.overloadpacket.__name__, args[0]
        if name == "view" and list(args[1]) == list(whole.shape):
            return cls(*(getattr(whole, each) for each in PARTS), whole.bits)
        if name in ("detach", "clone", "alias"):
            return cls(*(func(getattr(whole, each)) for each in PARTS), whole.bits)
        if name == "copy_":
            for each in PARTS:
                getattr(whole, each).copy_(getattr(args[1], each))
            return whole
        if name == "_to_copy":
            return cls(*(getattr(whole, each).clone() for each in PARTS), whole.bits)
        if name == "is_pinned":
            return False
        if name == "slice" and (len(args) < 2 or args[1] == 0):
            rows = slice(*args[2:4])
            return cls(whole.codes[rows], whole.scale[rows], whole.mean, whole.bits)
        raise NotImplementedError(name)


def scaled(rows: int, seed: int) -> Any:
    """Return a whole one."""
    of = torch.Generator().manual_seed(seed)
    codes = torch.randint(-100, 100, (rows, 4), dtype=torch.int8, generator=of)
    return Scaled(codes, torch.rand(rows, generator=of), torch.rand((), generator=of))


def cut(whole: Any, sizes: tuple[int, ...] = (), placements: tuple[Placement, ...] = ()) -> DTensor:
    """Return `whole` over a mesh, by default cut by rows over all ranks."""
    mesh = init_device_mesh("cpu", sizes or (dist.get_world_size(),))
    numbers = distribute_tensor(torch.arange(len(whole.codes)), mesh, placements or [Shard(0)])
    mine = numbers.to_local()
    local = Scaled(whole.codes[mine], whole.scale[mine], whole.mean.clone(), whole.bits)
    return DTensor.from_local(
        local,
        mesh,
        placements or [Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare what two that are laid out alike have on this rank, bit for bit."""
    one, other = pieces(left, "left"), pieces(right, "right")
    return one.keys() == other.keys() and all(
        torch.equal(
            each.to_local() if isinstance(each, DTensor) else each,
            other[name].to_local() if isinstance(each, DTensor) else other[name],
        )
        for name, each in one.items()
    )
