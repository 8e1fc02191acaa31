"""SIGKILL at a random moment of a training that saves all the time, again and again.

Unlike the sweeps of `test_kill_everywhere` this kills amid work that overlaps: a save in the
background, the deletion of older ones, the next step's capture, and a second rank. Each checkpoint
must have seen exactly the samples of the steps before it, each once, whatever was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import ElasticSampler, keep
from dist_ckpt.errors import CheckpointError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.testing.ranks import run_ranks
from tests.services.s3 import S3Service

ENOUGH_STEPS = 100_000  # a kill ends every life long before
LONGEST_LIFE_SECONDS = 0.4
SAMPLES, GLOBAL_BATCH = 1 << 16, 2


def state() -> dict[str, Any]:
    sampler = ElasticSampler(SAMPLES, global_batch=GLOBAL_BATCH, seed=1)
    weights = {"weights": torch.zeros(3, 50_000)}
    return {"model": weights, "progress": {"step": 0}, "sampler": sampler}


def train_until_killed(root: str, logs: str, victim: int, seconds: float, after: int) -> None:
    """Go on with the run and save every step, until `victim` is killed.

    Args:
        root: the run.
        logs: a folder; `acknowledged` there gets the steps that were said to be safe, and a file of
            each rank the samples that it saw.
        victim: the rank that is killed,
        seconds: so long after its restore,
        after: and after so many saves of this life.
    """
    rank = int(os.environ["RANK"])
    parts = state()
    log, seen = (
        os.open(Path(logs) / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for name in ("acknowledged", f"seen-{rank}")
    )
    kill = threading.Timer(seconds, os.kill, args=(os.getpid(), signal.SIGKILL))
    try:
        with dist_ckpt.Checkpointer(
            root, parts, keep=keep.latest(2), save_last=False, timeout_seconds=600
        ) as ckpt:
            first = ckpt.restore() + 1
            samples = parts["sampler"].batches(parts["sampler"])
            for step, batch in zip(range(first, ENOUGH_STEPS), samples, strict=False):
                if rank == victim and step == first + after:
                    kill.start()
                os.write(seen, json.dumps([step, batch]).encode() + b"\n")
                parts["model"]["weights"].fill_(step)
                parts["progress"]["step"] = step
                # Every third is waited for: what was then said to be safe must be found again.
                handle = ckpt.save(step)
                if step % 3 == 0 or step < first + after:
                    handle.wait()
                    os.write(log, b"%d\n" % step)
    except CheckpointError:
        if rank == victim:
            raise


def check_run(root: str, logs: Path, *, newest: int | None) -> list[int]:
    """Check that listed checkpoints are whole and exact; return the steps of all.

    Args:
        root: the run.
        logs: see `train_until_killed`.
        newest: how many to check; all for None.
    """
    repository = Repository(resolve(root))
    steps = repository.steps()
    for step in steps if newest is None else steps[-newest:]:
        assert repository.verify(step).ok, f"step {step} is listed and damaged"
        found = state()
        order = list(chain.from_iterable(islice(iter(found["sampler"]), step)))
        dist_ckpt.load(found, root, step=step)
        assert found["progress"] == {"step": step}
        assert torch.equal(found["model"]["weights"], torch.full((3, 50_000), float(step)))
        assert found["sampler"].consumed == step * GLOBAL_BATCH == len(order)
        assert sorted(seen_until(step, logs)) == sorted(order), f"until step {step}, each once"
    repository.store.close()
    return steps


def seen_until(step: int, logs: Path) -> list[int]:
    """Return the samples that all ranks saw in the history that led to `step`."""
    found: list[int] = []
    for log in logs.glob("seen-*"):
        # A step that was taken again replaces itself.
        history = dict(json.loads(line) for line in log.read_text().splitlines())
        found += [sample for taken, batch in history.items() if taken <= step for sample in batch]
    return found


@pytest.mark.parametrize(
    ("world", "kills"),
    [
        *[(1, 8), (2, 4)],
        pytest.param(1, 140, marks=pytest.mark.soak),
        pytest.param(2, 60, marks=pytest.mark.soak),
    ],
)
def test_random_kills(world: int, kills: int, tmp_path: Path) -> None:
    check_kills(world, kills, str(tmp_path / "run"), tmp_path)


@pytest.mark.parametrize(
    ("world", "kills"),
    [
        (2, 3),
        pytest.param(1, 100, marks=pytest.mark.soak),
        pytest.param(2, 100, marks=pytest.mark.soak),
    ],
)
def test_random_kills_on_s3(
    world: int, kills: int, s3_service: S3Service, s3_name: str, tmp_path: Path
) -> None:
    check_kills(world, kills, s3_service.url(s3_name), tmp_path)


def check_kills(world: int, kills: int, root: str, logs: Path) -> None:
    rng = random.Random(world)
    newest = 0
    for life in range(kills):
        victim = rng.randrange(world)
        seconds = rng.uniform(0, LONGEST_LIFE_SECONDS)
        run_ranks(
            world,
            train_until_killed,
            *(root, str(logs), victim, seconds, life % 2),  # each second one gets a step on
            expect_killed={victim},
        )
        # Who is killed so soon has no time to tidy up, so there are more of them with each life.
        steps = check_run(root, logs, newest=None if life in (kills // 2, kills - 1) else 3)
        safe = max(map(int, (logs / "acknowledged").read_text().split()), default=0)
        reached = max(steps, default=0)
        assert reached >= safe, f"life {life}: step {safe} was reported safe and is gone"
        assert reached >= newest, f"life {life}: step {newest} was there before and is gone"
        newest = reached
    assert newest >= kills // 2, "the lives must have been long enough to get on"
