"""A share larger than the memory for it: saved in turns, by several ranks, and loaded as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt.errors import CheckpointError, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

MIB = 1 << 20


def state() -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(1, MIB), torch.nn.Linear(600, 1200))
    return net, {"model": net, "notes": {"text": "x" * 2 * MIB}}


def save_limited(root: str) -> None:
    net, whole = state()
    rank = dist.get_rank()
    # The third file of rank 1 cannot be stored: the ranks are between two turns then.
    rule = Rule("put", Fail(StorageError("disk full")), key="*model.r00001-00002*", nth=1)
    store = FaultyStore(LocalStore(root), [rule])
    whole["model"] = DistributedDataParallel(net)
    with dist_ckpt.Checkpointer(store, whole, memory_limit_bytes=MIB, timeout_seconds=600) as ckpt:
        with pytest.raises(CheckpointError, match="disk full") as error:
            ckpt.save(1).wait()
        assert list(error.value.ranks) == [1] or rank == 1
        handle = ckpt.save(2)
        with torch.no_grad():
            next(net.parameters()).zero_()
        handle.wait()


def test_ranks_save_in_turns_and_one_process_loads(tmp_path: Path) -> None:
    run_ranks(2, save_limited, str(tmp_path))
    checkpoint = Repository(LocalStore(tmp_path)).open(2)
    names = [file.name for file in checkpoint.index.files if file.name.startswith("model")]
    assert "model.r00000-00001.safetensors" in names
    assert "model.r00001-00004.safetensors" in names
    sizes = [file.nbytes for file in checkpoint.index.files if file.name in names]
    assert max(sizes) <= MIB
    fresh, whole = state()
    wanted = [each.detach().clone() for each in fresh.parameters()]
    for each in fresh.parameters():
        torch.nn.init.constant_(each, -1)
    dist_ckpt.load(whole, tmp_path)
    for each, value in zip(fresh.parameters(), wanted, strict=True):
        assert torch.equal(each.detach(), value)
    assert Repository(LocalStore(tmp_path)).steps() == [2]
