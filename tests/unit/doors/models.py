"""What the tests of the doors save, and how they compare what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import dist_ckpt


class Net(nn.Module):
    """Tensors of several dtypes, one of no element, one of none dimension, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 11)
        self.layers = nn.ModuleList(nn.Linear(11, 11) for _ in range(2))
        self.low = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.lm_head = nn.Linear(11, 37, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("ids", torch.arange(5).to(torch.uint16))


def saved(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a run with one checkpoint of a `Net`, and what is in it."""
    net = Net()
    dist_ckpt.save({"model": net, "epoch": 3}, folder / "run", step=5)
    return folder / "run", net.state_dict()


def load_torch(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Return what torch itself reads without executing anything."""
    found: dict[str, torch.Tensor] = torch.load(  # noqa: TID251  what is tested is torch
        path, weights_only=True, mmap=mmap
    )
    return found


def check_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Check that names, dtypes, shapes and bits are the same."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert _bits(found[name]) == _bits(tensor), name


def _bits(tensor: torch.Tensor) -> list[int]:
    return list(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
