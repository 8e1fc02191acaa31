"""Megatron-Core saves and loads through our Writer and Reader, as the guide says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
]

BEFORE = """
from argparse import Namespace
import warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def state(filled=True):
    weight = torch.arange(16.0).reshape(8, 2) if filled else torch.zeros(8, 2)
    halves = [
        ShardedTensor.from_rank_offsets("w", half.clone(), (0, number, 2))
        for number, half in enumerate(weight.split(4))
    ]
    random = {"state": torch.full((4,), 7, dtype=torch.uint8)} if filled else None
    return {
        "model": {"top": halves[0], "bottom": halves[1]},
        "rng": ShardedObject("rng", random, (1,), (0,)),
        "iteration": 1000,
        "args": Namespace(lr=0.1, dtype=torch.bfloat16),
    }
"""
AFTER = """
assert loaded["model"]["top"].tolist() == torch.arange(8.0).reshape(4, 2).tolist()
assert loaded["model"]["bottom"].tolist() == (torch.arange(8.0) + 8).reshape(4, 2).tolist()
assert loaded["rng"]["state"].tolist() == [7] * 4
assert loaded["iteration"] == 1000 and loaded["args"].dtype is torch.bfloat16
known = load_strategy.load_tensors_metadata(checkpoint_dir)
assert known["w"].global_shape == (8, 2)
dist.destroy_process_group()
"""


def test_python_runs(tmp_path: Path) -> None:
    strategy, calls = guides.blocks(guides.guide("megatron"), "python")
    calls = calls.replace("load(state()", "load(state(filled=False)")
    guides.run(f"{BEFORE}{strategy}{calls}{AFTER}", tmp_path, limit_seconds=900)
    assert Repository(resolve(tmp_path / "runs" / "gpt")).steps() == [1000]
