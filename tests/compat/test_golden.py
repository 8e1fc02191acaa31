"""Checkpoints of every released format are read for ever."""

from __future__ import annotations

import math
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


def test_there_is_one_for_each_version() -> None:
    assert [path.name for path in GOLDEN] == ["format-1", "format-2"]
