"""SIGKILL at a random moment of a training that saves all the time, again and again.

Unlike the sweeps of `test_kill_everywhere` this kills amid work that overlaps: a save in the
background, the deletion of older ones, the next step's capture, and a second rank.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import CheckpointError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks

ENOUGH_STEPS = 100_000  # a kill ends every life long before
LONGEST_LIFE_SECONDS = 0.4


def state() -> dict[str, Any]:
    return {"model": {"weights": torch.zeros(3, 50_000)}, "progress": {"step": 0}}


def train_until_killed(root: str, acknowledged: str, victim: int, seconds: float) -> None:
    """Go on with the run and save every step; `victim` is killed `seconds` after its restore."""
    rank = int(os.environ["RANK"])
    parts = state()
    log = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        with dist_ckpt.Checkpointer(
            root, parts, keep=keep.latest(2), save_last=False, timeout_seconds=2
        ) as ckpt:
            first = ckpt.restore() + 1
            if rank == victim:
                kill = (os.getpid(), signal.SIGKILL)
                threading.Timer(seconds, os.kill, args=kill).start()
            for step in range(first, ENOUGH_STEPS):
                parts["model"]["weights"].fill_(step)
                parts["progress"]["step"] = step
                # Every third is waited for: what was then said to be safe must be found again.
                handle = ckpt.save(step)
                if step % 3 == 0:
                    handle.wait()
                    os.write(log, b"%d\n" % step)
    except CheckpointError:
        if rank == victim:
            raise


def check_run(root: Path) -> list[int]:
    """Check that every listed checkpoint is whole and exact; return the steps."""
    repository = Repository(LocalStore(root))
    steps = repository.steps()
    for step in steps:
        assert repository.verify(step).ok, f"step {step} is listed and damaged"
        found = state()
        dist_ckpt.load(found, root, step=step)
        assert found["progress"] == {"step": step}
        assert torch.equal(found["model"]["weights"], torch.full((3, 50_000), float(step)))
    return steps


@pytest.mark.parametrize(
    ("world", "kills"),
    [
        *[(1, 14), (2, 6)],
        pytest.param(1, 140, marks=pytest.mark.soak),
        pytest.param(2, 60, marks=pytest.mark.soak),
    ],
)
def test_random_kills(world: int, kills: int, tmp_path: Path) -> None:
    root, acknowledged = tmp_path / "run", tmp_path / "acknowledged"
    rng = random.Random(world)
    newest = -1
    for life in range(kills):
        victim = rng.randrange(world)
        seconds = rng.uniform(0, LONGEST_LIFE_SECONDS)
        run_ranks(
            world,
            train_until_killed,
            *(str(root), str(acknowledged), victim, seconds),
            expect_killed={victim},
        )
        steps = check_run(root) if root.exists() else []
        safe = max(map(int, acknowledged.read_text().split()), default=-1)
        reached = max(steps, default=-1)
        assert reached >= safe, f"life {life}: step {safe} was reported safe and is gone"
        assert reached >= newest, f"life {life}: step {newest} was there before and is gone"
        newest = reached
    assert newest > kills, "the lives must have been long enough to get on"
