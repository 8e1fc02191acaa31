"""Replicas that drift apart between two saves are found, though only samples are compared."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from dist_ckpt.repository import Repository
from dist_ckpt.saving.agreement import SAMPLES
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks


def saves_until_found(root: str, drifts: str) -> tuple[int, str]:
    """Save until a drift on rank 1 is found; return how many saves did not, and the message."""
    torch.manual_seed(0)
    last = torch.nn.Linear(64, 4)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), last)
    model = DistributedDataParallel(net)
    with dist_ckpt.Checkpointer(f"{root}/{drifts}", {"model": model}) as ckpt:
        for step in range(1, 4):
            ckpt.save(step).wait()
        if dist.get_rank() == 1:
            with torch.no_grad():
                if drifts == "all":
                    for parameter in net.parameters():
                        parameter.mul_(1.001)
                else:
                    last.weight[2, 3] += 1e-6
        for count in range(SAMPLES + 1):
            try:
                ckpt.save(4 + count).wait()
            except IncompatibleError as error:
                return count, error.message
    return SAMPLES + 1, "not found"


def test_what_drifts_everywhere_is_found_at_the_next_save(tmp_path: Path) -> None:
    found = run_ranks(2, saves_until_found, str(tmp_path), "all")
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert "has other values on rank 0 than on rank 1" in found[0][1]
    assert Repository(LocalStore(tmp_path / "all")).steps() == [1, 2, 3]


def test_a_single_element_is_found_before_the_samples_come_round(tmp_path: Path) -> None:
    found = run_ranks(2, saves_until_found, str(tmp_path), "one")
    assert found[0] == found[1]
    assert found[0][0] < SAMPLES
    assert "'1.weight'" in found[0][1]
