"""Saves while strangers are at the port of rank 0: none is heard, and nothing waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from torch.distributed.distributed_c10d import PrefixStore

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.ranks.rendezvous import Address, training_store
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.crash import flood


def save_under_fire(root: str, saves: int, connections: int) -> int:
    """Save at least so often, and until the strangers have gone; return how often."""
    weights = torch.zeros(3, 50_000)
    state = {"model": {"weights": weights}}
    with dist_ckpt.Checkpointer(root, state, keep=keep.latest(2), save_last=False) as ckpt:
        ckpt.restore()
        crowd = begin_flood(connections) if os.environ["RANK"] == "1" else None
        step = 0
        while True:
            over = torch.tensor(int(crowd is not None and crowd.poll() is not None))
            torch.distributed.all_reduce(over)
            if over and step >= saves:
                break
            step += 1
            weights.fill_(step)
            ckpt.save(step).wait()
        if crowd is not None:
            assert crowd.wait() == 0
            assert crowd.stdout is not None
            crowd.stdout.close()
    return step


def begin_flood(connections: int) -> subprocess.Popen[bytes]:
    """Have strangers come, and return when the first was there."""
    known = PrefixStore("dist_ckpt/0", training_store()).get("address")
    port = msgspec.json.decode(known, type=Address).port
    command = [sys.executable, str(flood.__file__), str(port), str(connections), "1"]
    crowd = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert crowd.stdout is not None
    assert crowd.stdout.readline() == b"begun\n"
    return crowd


@pytest.mark.parametrize(
    ("saves", "connections"),
    [(5, 200), pytest.param(50, 10_000, marks=pytest.mark.soak)],
)
def test_saves_commit_whatever_strangers_say(saves: int, connections: int, tmp_path: Path) -> None:
    steps = run_ranks(2, save_under_fire, str(tmp_path / "run"), saves, connections)
    assert steps[0] == steps[1] >= saves
    repository = Repository(LocalStore(tmp_path / "run"))
    assert repository.steps() == [steps[0] - 1, steps[0]], "each was committed, and two are kept"
    assert all(repository.verify(step).ok for step in repository.steps())
