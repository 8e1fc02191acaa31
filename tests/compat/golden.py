"""The state that the golden checkpoints hold, and how they were made.

A golden checkpoint is written once, by the version that it is named for, and never again:
`python -m tests.compat.golden DIRECTORY` is for a new format version only.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks

STEP = 1200


def net(*, filled: bool, sharded: bool) -> torch.nn.Module:
    """Return a module of two buffers; `sharded` cuts them by rows over the ranks."""
    module = torch.nn.Module()
    for name, dtype, rows in (("wide", torch.float32, 5), ("narrow", torch.bfloat16, 3)):
        whole = torch.arange(rows * 4).reshape(rows, 4).to(dtype) + 0.5
        whole = whole if filled else torch.zeros_like(whole)
        module.register_buffer(name, shard(whole) if sharded else whole)
    return module


def values(*, filled: bool) -> dict[Any, Any]:
    """Return plain values of many types."""
    if not filled:
        return {"best": 0.0, "history": [], "table": np.zeros(4, np.int16), 3: None}
    return {
        "best": float("-inf"),
        "history": [(1, 0.1), (2, b"\x00\xff"), {"nested": {1.5, 2.5}}, 2**80],
        "table": np.array([1, -2, 3, -4], np.int16),
        3: torch.float16,
    }


def shard(whole: torch.Tensor) -> DTensor:
    """Return `whole` cut by rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = -(-whole.shape[0] // mesh.size())
    local = whole[rows * mesh.get_local_rank() :][:rows].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def write(root: str) -> None:
    """On each rank: save the golden state."""
    state = dist_ckpt.TrainState(
        model=net(filled=True, sharded=True),
        values=values(filled=True),
        own=dist_ckpt.PerRank({"rank": dist.get_rank()}),
        rng=None,
    )
    with dist_ckpt.Checkpointer(root, state, metadata={"note": "golden"}) as ckpt:
        ckpt.save(STEP, metrics={"loss": 0.25, "worst": float("nan")}).wait()


if __name__ == "__main__":
    run_ranks(2, write, sys.argv[1])
