"""Loads of several ranks: how many bytes they read from storage, all of them together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import dist_ckpt
from benchmarks.measure import no_warnings
from benchmarks.workload import State
from dist_ckpt import TrainState
from dist_ckpt.storage import LocalStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.testing.ranks import run_ranks

RANKS = 4

Layout = Literal["fsdp", "columns", "rows"]

_TIMEOUT_SECONDS = 300
# Rows and columns of float32: 8 MiB each and more, one of them divided by no world size.
_SHAPES = ((2048, 1024), (1200, 3000), (4096, 1536), (2111, 1031))


@dataclass(frozen=True, slots=True)
class Reshard:
    """A checkpoint of one layout, loaded into another.

    Attributes:
        name: what the table calls it.
        saved: layout and ranks at the save.
        loaded: layout and ranks at the load.
    """

    name: str
    saved: tuple[Layout, int]
    loaded: tuple[Layout, int]


RESHARDS = (
    Reshard("FSDP2 4 -> 2", ("fsdp", 4), ("fsdp", 2)),
    Reshard("FSDP2 2 -> 4", ("fsdp", 2), ("fsdp", 4)),
    Reshard("FSDP2 4 -> 3", ("fsdp", 4), ("fsdp", 3)),
    Reshard("FSDP2 1 -> 4", ("fsdp", 1), ("fsdp", 4)),
    Reshard("FSDP2 4 -> TP 2, columns", ("fsdp", 4), ("columns", 2)),
    Reshard("FSDP2 4 -> TP 2, rows", ("fsdp", 4), ("rows", 2)),
    Reshard("TP 2 -> 4, columns", ("columns", 2), ("columns", 4)),
    Reshard("TP 2 -> 4, rows", ("rows", 2), ("rows", 4)),
)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What all ranks of a load did together, in bytes.

    Attributes:
        wanted: of the boxes of all ranks; of replicas, once.
        ours: read from storage by this package, descriptions included.
        stock: by stock DCP of its own checkpoint of the same state.
    """

    wanted: int
    ours: int
    stock: int


def replicas(place: Path, scale: float) -> Bytes:
    """Load one state on four ranks that all want the whole of it, as under DDP."""
    results = run_ranks(RANKS, _replica, str(place), scale, timeout_seconds=_TIMEOUT_SECONDS)
    return Bytes(results[0][0], *(sum(column) for column in list(zip(*results, strict=True))[1:]))


def reshard(place: Path, case: Reshard, shapes: tuple[tuple[int, int], ...] = _SHAPES) -> Bytes:
    """Save in the one layout and load in the other.

    Args:
        place: an empty folder.
        case: the layouts.
        shapes: of the weights.
    """
    (before, many), (after, few) = case.saved, case.loaded
    run_ranks(many, _save, str(place), before, shapes, timeout_seconds=_TIMEOUT_SECONDS)
    results = run_ranks(few, _load, str(place), after, shapes, timeout_seconds=_TIMEOUT_SECONDS)
    return Bytes(*(sum(column) for column in zip(*results, strict=True)))


def _replica(place: str, scale: float) -> tuple[int, int, int]:
    state = State(scale)
    parts = TrainState(model=state.model, optimizer=state.optimizer, rng=None)
    dist_ckpt.save(parts, f"{place}/ours")
    with no_warnings():
        dcp_save(state.state_dict(), checkpoint_id=f"{place}/stock")
    ours, _ = _metered(f"{place}/ours", parts)
    return state.nbytes, ours, _stock(lambda: state.state_dict(), place)


def _save(place: str, layout: Layout, shapes: tuple[tuple[int, int], ...]) -> None:
    model = _model(layout, shapes)
    dist_ckpt.save(TrainState(model=model, rng=None), f"{place}/ours")
    with no_warnings():
        dcp_save({"model": model.state_dict()}, checkpoint_id=f"{place}/stock")


def _load(place: str, layout: Layout, shapes: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    model = _model(layout, shapes)
    ours, wanted = _metered(f"{place}/ours", TrainState(model=model, rng=None))
    return wanted, ours, _stock(lambda: {"model": model.state_dict()}, place)


def _model(layout: Layout, shapes: tuple[tuple[int, int], ...]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp":
        for each in model:
            fully_shard(each, mesh=mesh)
    else:
        style = ColwiseParallel if layout == "columns" else RowwiseParallel
        for each in model:
            parallelize_module(each, mesh, style())
    return model


def _metered(place: str, parts: TrainState) -> tuple[int, int]:
    """Load; return the bytes that the store was asked for, and those that were wanted."""
    store = MeterStore(LocalStore(place))
    report = dist_ckpt.load(parts, store)
    return store.usage().operations["read_into"].nbytes, report.nbytes_wanted


def _stock(state_dict: Callable[[], dict[str, Any]], place: str) -> int:
    """Load by stock; return the bytes that this process read."""
    before = _bytes_read()
    with no_warnings():
        dcp_load(state_dict(), checkpoint_id=f"{place}/stock")
    return _bytes_read() - before


def _bytes_read() -> int:
    # What system calls gave, out of the page cache too. The plans that ranks exchange are small.
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0
