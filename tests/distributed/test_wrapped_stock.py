"""Tensors that are several behind one face, under torch's own `save` and `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import Replicate, Shard

import dist_ckpt
from dist_ckpt.dcp import Planner, Reader, Writer
from dist_ckpt.testing.ranks import run_ranks
from tests.distributed.scaled import cut, same, scaled


def state_of(seed: int) -> dict[str, Any]:
    size = dist.get_world_size()
    halves = (2, size // 2)
    return {
        "model": {
            "even": cut(scaled(12, seed)),
            "uneven": cut(scaled(7, seed + 1)),
            "few": cut(scaled(1, seed + 2)),
            "whole": scaled(5, seed + 3),
            "twice": cut(scaled(6, seed + 4), (size,), (Replicate(),)),
            "both": cut(scaled(8, seed + 5), halves, (Replicate(), Shard(0))),
            "plain": torch.full((3,), float(seed)),
        },
        "ema": [{"w": scaled(3, seed + 6)}],
    }


def leaves(state: dict[str, Any]) -> dict[str, Any]:
    return {**state["model"], "ema": state["ema"][0]["w"]}


def wrong_of(state: dict[str, Any], seed: int) -> list[str]:
    expected = leaves(state_of(seed))
    return [name for name, each in leaves(state).items() if not same(each, expected[name])]


WAYS = ("stock", "planner", "async")


def save_all(root: str, every: bool) -> list[str]:
    save(state_of(1), storage_writer=Writer(f"{root}/stock"))
    save(state_of(1), storage_writer=Writer(f"{root}/planner"), planner=Planner())
    found = async_save(state_of(1), storage_writer=Writer(f"{root}/async"))
    found.result()  # type: ignore[union-attr]
    return load_all(root, every) if every else []


class Asked(DefaultLoadPlanner):
    """Is asked for each tensor in turn."""

    def resolve_tensor(self, read_item: Any) -> Any:
        return super().resolve_tensor(read_item)


def load_all(root: str, every: bool) -> list[str]:
    wrong = []
    for number, way in enumerate(WAYS):
        for planner in (None, Asked()) if every or not number else (None,):
            live = state_of(2)
            kept = leaves(live)
            load(live, storage_reader=Reader(f"{root}/{way}"), planner=planner)
            wrong += [f"{way} {planner} {name}" for name in wrong_of(live, 1)]
            assert all(each is kept[name] for name, each in leaves(live).items())
        if every or not number:
            live = state_of(2)
            dist_ckpt.load(live, f"{root}/{way}", skip=["rng"])
            wrong += [f"{way} by dist_ckpt.load {name}" for name in wrong_of(live, 1)]
    return wrong


def test_wrapped_tensors_are_saved_and_resharded(tmp_path: Path) -> None:
    run_ranks(4, save_all, str(tmp_path), False)
    assert run_ranks(2, load_and_refuse, str(tmp_path)) == [[]] * 2


def load_and_refuse(root: str) -> list[str]:
    wrong = load_all(root, False)
    refused(root)
    return wrong


@pytest.mark.soak
def test_wrapped_tensors_are_saved_and_resharded_in_every_way(tmp_path: Path) -> None:
    assert run_ranks(4, save_all, str(tmp_path), True) == [[]] * 4
    for size in (2, 6):
        assert run_ranks(size, load_all, str(tmp_path), True) == [[]] * size


def refused(root: str) -> None:
    rank = dist.get_rank()
    own: Any = cut(scaled(4, 1))
    own.to_local().mean.fill_(rank)
    kind = scaled(4, 1)
    kind.bits -= rank
    for number, (state, match) in enumerate(
        [
            ({"w": own}, "w.mean', which is one for all of its shards, has other values on rank"),
            ({"w": cut(kind)}, "with 7.* on rank 1"),
            (
                {"w": cut(scaled(4, 1)), "w.scale": torch.ones(2)},
                "'model.w.scale', as something else",
            ),
        ]
    ):
        with pytest.raises(CheckpointException, match=match):
            save({"model": state}, storage_writer=Writer(f"{root}/refused", step=number))
    refused_loads(root)


def refused_loads(root: str) -> None:
    four = scaled(5, 9)
    four.bits = 4
    for name, instead, match in [
        (
            "whole",
            torch.zeros(5, 4),
            "a .*Scaled, which is several tensors in one in .*none is conv",
        ),
        ("plain", scaled(3, 1), "Size mismatch"),
        ("whole", four, r"8, and a .*Scaled with 4"),
    ]:
        live = state_of(2)
        live["model"][name] = instead
        with pytest.raises(CheckpointException, match=match):
            load(live, storage_reader=Reader(f"{root}/stock"))
        live["model"][name] = state_of(2)["model"][name]
        assert wrong_of(live, 2) == []
