"""`dcp.save` and `dcp.load` through this package against stock storage, side by side in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.measure import Case, interleave, say, verdict
from dist_ckpt.dcp import Reader, Writer

TARGET = 1.0

_STOCK, _OURS = "stock", "dist_ckpt.dcp"


def _states(scale: float) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What costs a checkpoint something besides its bytes: many entries, or a large value."""
    tensors, values, keys = (max(1, int(scale * each)) for each in (10_000, 3_000, 1_000))
    return {
        f"{tensors} tensors": lambda: {
            "model": {f"layer{i}.weight": torch.ones(8, 8) for i in range(tensors)}
        },
        f"{values} values": lambda: {"values": {f"v{i}": i for i in range(values)}},
        f"a tuple of {100 * values} numbers": lambda: {"t": tuple(range(100 * values))},
        "one BytesIO": lambda: {"b": BytesIO(bytes(int(scale * (50 << 20))))},
        f"{keys} top-level keys": lambda: {f"key{i}": {"w": torch.ones(8)} for i in range(keys)},
        "one large tensor": lambda: {"model": {"w": torch.ones(int(scale * (64 << 20)))}},
    }


def under_dcp(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure saves, then loads of what they wrote; print the seconds of both and the verdicts."""
    met = True
    for number, (what, make) in enumerate(_states(chosen.scale).items()):
        state, folder = make(), place / str(number)
        numbers = count()
        saves = [
            Case(_STOCK, partial(_stock_save, state, folder / "stock", numbers)),
            Case(_OURS, partial(_our_save, state, Writer(folder / "ours"), numbers)),
        ]
        met &= _compare(f"save {what}", saves, chosen.repeats)
        loads = [
            Case(_STOCK, partial(_stock_load, state, folder / "stock")),
            Case(_OURS, partial(load, state, storage_reader=Reader(folder / "ours"), no_dist=True)),
        ]
        met &= _compare(f"load {what}", loads, chosen.repeats)
    return met


def _stock_save(state: dict[str, Any], folder: Path, numbers: Iterator[int]) -> None:
    save(state, checkpoint_id=folder / str(next(numbers)), no_dist=True)


def _our_save(state: dict[str, Any], writer: Writer, numbers: Iterator[int]) -> None:
    save(state, checkpoint_id=str(next(numbers)), storage_writer=writer, no_dist=True)


def _stock_load(state: dict[str, Any], folder: Path) -> None:
    newest = max(folder.iterdir(), key=lambda path: int(path.name))
    load(state, checkpoint_id=newest, no_dist=True)


def _compare(what: str, cases: list[Case], repeats: int) -> bool:
    seconds = {
        name: median(samples.seconds)
        for name, samples in interleave(cases, repeats=repeats).items()
    }
    say(f"{what}: stock {seconds[_STOCK]:.3f} s, dist_ckpt {seconds[_OURS]:.3f} s")
    return verdict("against stock", seconds[_OURS] / seconds[_STOCK], target=TARGET)
