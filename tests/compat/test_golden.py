"""Checkpoints of every released format are read for ever."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.compat.golden import STEP, net, shard, values
from tests.distributed.layouts import local

GOLDEN = sorted(path for path in Path(__file__).parent.glob("format-*") if path.is_dir())


def load(root: str) -> tuple[dict[Any, Any], int]:
    """Load the golden state at two ranks, sharded, and return its plain values."""
    module = net(filled=False, sharded=True)
    state = dist_ckpt.TrainState(
        model=module,
        values=values(filled=False),
        own=dist_ckpt.PerRank({"rank": -1}),
        rng=None,
    )
    report = dist_ckpt.load(state, root)
    assert report.step == STEP
    for name, whole in net(filled=True, sharded=False).named_buffers():
        mine = local(dict(module.named_buffers())[name])
        assert torch.equal(mine, local(shard(whole))), name
    assert state["own"] == {"rank": dist.get_rank()}
    return state["values"], report.saved_world_size


@pytest.mark.parametrize("root", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_is_read(root: Path) -> None:
    for found, saved_world_size in run_ranks(2, load, str(root)):
        expected = values(filled=True)
        assert saved_world_size == 2
        assert np.array_equal(found.pop("table"), expected.pop("table"))
        assert found == expected


@pytest.mark.parametrize("root", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_verifies(root: Path) -> None:
    repository = Repository(LocalStore(root))
    assert repository.steps() == [STEP]
    assert repository.verify(STEP).ok
    manifest = repository.open(STEP).manifest
    assert manifest.metadata == {"note": "golden"}
    assert manifest.metrics["loss"] == 0.25
    assert math.isnan(manifest.metrics["worst"])


def go_on(root: str) -> None:
    """Restore the newest checkpoint of the run, and save two more."""
    state = dist_ckpt.TrainState(
        model=net(filled=False, sharded=True),
        values=values(filled=False),
        own=dist_ckpt.PerRank({"rank": -1}),
        rng=None,
    )
    with dist_ckpt.Checkpointer(root, state, keep=dist_ckpt.keep.latest(2)) as ckpt:
        assert ckpt.restore() == STEP
        ckpt.save(STEP + 1).wait()
        ckpt.save(STEP + 2).wait()


def test_a_run_of_format_1_goes_on_in_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "format-1", run)
    run_ranks(2, go_on, str(run))
    repository = Repository(LocalStore(run))
    assert [record.step for record in repository.records()] == [STEP, STEP + 1, STEP + 2]
    assert [repository.open(step).manifest.format for step in repository.steps()] == [1, 2, 2]
    assert all(repository.verify(step).ok for step in repository.steps())
    repository.retain(dist_ckpt.keep.latest(1), claim=repository.claim())
    assert repository.steps() == [STEP + 2]
    assert not (run / f"step-{STEP:010d}").exists()


def test_there_is_one_for_each_version() -> None:
    assert [path.name for path in GOLDEN] == ["format-1", "format-2"]
