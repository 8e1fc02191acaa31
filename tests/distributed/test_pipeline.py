"""Ranks that hold different parts of one model, as the stages of a pipeline do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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


def only_somewhere(root: str, owner: int) -> list[object]:
    """Save and load parts of each kind that one rank has alone, and return what came back there."""

    def state(value: int) -> dict[str, Any]:
        every: dict[str, Any] = {"everywhere": {"at": value}}
        if dist.get_rank() == owner:
            every["head"] = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(every["head"].weight, value)
            every["table"] = torch.full((3,), float(value))
            every["counts"] = {"seen": value}
            every["mine"] = dist_ckpt.PerRank({"seen": value})
        return every

    dist_ckpt.save(state(7), root)
    loaded = state(0)
    dist_ckpt.load(loaded, root)
    assert loaded["everywhere"] == {"at": 7}
    if dist.get_rank() != owner:
        return []
    return [
        loaded["head"].weight.unique().tolist(),
        loaded["table"].tolist(),
        loaded["counts"],
        loaded["mine"].value,
    ]


@pytest.mark.parametrize("owner", [0, 1])
def test_a_part_that_one_rank_has_alone_comes_back(tmp_path: Path, owner: int) -> None:
    found = run_ranks(2, only_somewhere, str(tmp_path / "run"), owner)
    assert found[owner] == [[7.0], [7.0, 7.0, 7.0], {"seen": 7}, {"seen": 7}]
    parts = dist_ckpt.Run(str(tmp_path / "run")).newest().parts
    assert set(parts) >= {"everywhere", "head", "table", "counts", "mine"}
