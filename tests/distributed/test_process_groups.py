"""Process groups come and go; a save belongs to the one that is there."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, not in its stubs

import dist_ckpt
from dist_ckpt.ranks import rendezvous
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks

GROUPS = 3


def save_in_each_group(root: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Under torchrun one store outlives every process group of a process. gloo does not always find
    # its peers again there, so here only what dist_ckpt publishes goes to such a store.
    shared = FileStore(f"{root}/shared", world_size)
    vars(rendezvous)["training_store"] = lambda: shared
    for number in range(GROUPS):
        if number:
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group(
                "gloo",
                init_method=f"file://{root}/group-{number}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
        state = {"x": {"t": torch.full((40_000,), float(number))}}
        dist_ckpt.save(state, f"{root}/run-{number}", step=number, timeout_seconds=600)


def test_each_group_of_a_process_has_its_own_saves(tmp_path: Path) -> None:
    run_ranks(2, save_in_each_group, str(tmp_path))
    for number in range(GROUPS):
        assert Repository(LocalStore(tmp_path / f"run-{number}")).steps() == [number]
