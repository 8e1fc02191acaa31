"""Ranks that hold different parts of one model, as the stages of a pipeline do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks


def stage(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return this rank's stage: a layer that no other rank has."""
    torch.manual_seed(seed + dist.get_rank())
    net = torch.nn.ModuleDict({f"stage{dist.get_rank()}": torch.nn.Linear(5, 5)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 * (dist.get_rank() + 1))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return net, optimizer


def values(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [parameter.detach() for parameter in net.parameters()]
    for parameter in net.parameters():
        found += [optimizer.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")]
    return found


def save_and_load(root: str) -> list[str]:
    net, optimizer = stage(seed=1)
    dist_ckpt.save({"model": net, "optimizer": optimizer}, root)
    other, its_optimizer = stage(seed=100)
    its_optimizer.param_groups[0]["lr"] = 9.0
    dist_ckpt.load({"model": other, "optimizer": its_optimizer}, root)
    pairs = zip(values(net, optimizer), values(other, its_optimizer), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)
    assert its_optimizer.param_groups[0]["lr"] == 0.1 * (dist.get_rank() + 1)
    return sorted(other.state_dict())


def test_each_stage_gets_its_own_back(tmp_path: Path) -> None:
    names = run_ranks(3, save_and_load, str(tmp_path))
    assert names == [[f"stage{rank}.bias", f"stage{rank}.weight"] for rank in range(3)]
