"""Saves run beside the collectives of the training and do not disturb them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks

SAVES, BARRIERS = 10, 20


def train(root: str) -> int:
    total = torch.zeros(())
    weights = {"w": torch.full((200, 500), float(dist.get_rank() >= 0))}
    with dist_ckpt.Checkpointer(root, {"weights": weights}, keep=keep.latest(3)) as ckpt:
        for step in range(1, SAVES + 1):
            weights["w"].fill_(step)
            ckpt.save(step)
            for number in range(BARRIERS):
                if number % dist.get_world_size() == dist.get_rank():
                    torch.linalg.inv(torch.eye(200))  # ranks arrive skewed
                dist.barrier()
                one = torch.ones(())
                dist.all_reduce(one)
                total += one
    return int(total)


def test_ten_saves_in_a_row_with_barriers_meanwhile(tmp_path: Path) -> None:
    assert run_ranks(4, train, str(tmp_path)) == [SAVES * BARRIERS * 4] * 4
    repository = Repository(LocalStore(tmp_path))
    assert repository.steps() == [8, 9, 10]
    for step in repository.steps():
        found = {"w": torch.zeros(200, 500)}
        dist_ckpt.load({"weights": found}, tmp_path, step=step)
        assert (found["w"] == step).all()
