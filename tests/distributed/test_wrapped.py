"""Sharded tensors that are several behind one face: resharded, and back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.dcp import Planner, Reader, Writer
from dist_ckpt.state.spread import inner_tensors
from dist_ckpt.testing.ranks import run_ranks
from tests import quantized as ao

# Three ranks cut 64 rows into 22, 22 and 20: the scales are cut just so.
ROWS, COLUMNS = 64, 256


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh)


def content(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole of an inner tensor: a function of its name."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = (torch.arange(count) * 7 + len(name) + sum(map(ord, name))) % 113
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(-1).view(torch.uint8)


def quantized(cls: Any) -> tuple[nn.Module, Any]:
    model = sharded(nn.Linear(COLUMNS, ROWS, bias=False))
    return model, cls(model.parameters())


def live_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    (parameter,) = model.parameters()
    state: dict[str, Any] = optimizer.state[parameter]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = optimizer._new_buffer(parameter, key == "exp_avg")
    state["step"] = torch.tensor(3.0)
    return state


def leaves(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        found |= inner_tensors(state[key], key)
    return found


def fill(state: dict[str, Any]) -> None:
    for name, leaf in leaves(state).items():
        whole = content(name, tuple(leaf.shape), leaf.dtype)
        assert isinstance(leaf, DTensor)
        # Some dtypes have no collectives, and all of them have bytes.
        fitting = distribute_tensor(as_bytes(whole), leaf.device_mesh, leaf.placements)
        as_bytes(leaf.to_local()).copy_(fitting.to_local())


def wrong_of(state: dict[str, Any]) -> list[str]:
    wrong = []
    for name, leaf in leaves(state).items():
        assert isinstance(leaf, DTensor)
        expected = as_bytes(content(name, tuple(leaf.shape), leaf.dtype))
        fitting = distribute_tensor(expected, leaf.device_mesh, leaf.placements)
        if not torch.equal(as_bytes(leaf.to_local()), fitting.to_local()):
            wrong.append(name)
    return wrong


def stock_dict(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_all(root: str) -> None:
    for cls in (ao.AdamW8bit, ao.AdamW4bit, ao.AdamWFp8):
        model, optimizer = quantized(cls)
        fill(live_state(model, optimizer))
        state = TrainState(rng=None, model=model, optimizer=optimizer)
        dist_ckpt.save(state, f"{root}/{cls.__name__}/ours")
        for planner in (None, Planner()):
            url = f"{root}/{cls.__name__}/{'stock' if planner is None else 'planner'}"
            save(stock_dict(model, optimizer), storage_writer=Writer(url), planner=planner)


def load_all(root: str) -> list[str]:
    wrong = []
    for cls in (ao.AdamW8bit, ao.AdamW4bit, ao.AdamWFp8):
        for url in (f"{root}/{cls.__name__}/{way}" for way in ("ours", "stock", "planner")):
            for fresh in (True, False):
                model, optimizer = quantized(cls)
                if not fresh:
                    live_state(model, optimizer)
                dist_ckpt.load(TrainState(rng=None, model=model, optimizer=optimizer), url)
                (parameter,) = model.parameters()
                found = wrong_of(optimizer.state[parameter])
                wrong += [f"{url} {name} {fresh=}" for name in found]
            model, optimizer = quantized(cls)
            state = live_state(model, optimizer)
            load(stock_dict(model, optimizer), storage_reader=Reader(url))
            wrong += [f"{url} {name} by a Reader" for name in wrong_of(state)]
    return wrong


# The library takes its time to be imported, by each rank.
@pytest.mark.soak
@pytest.mark.parametrize("worlds", [(1, 2, 3)])
def test_quantized_moments_are_resharded_bit_for_bit(
    worlds: tuple[int, ...], tmp_path: Path
) -> None:
    for saved in worlds:
        run_ranks(saved, save_all, f"{tmp_path}/{saved}")
        for now in worlds:
            assert run_ranks(now, load_all, f"{tmp_path}/{saved}") == [[]] * now


def nf4(fill: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 64 // mesh.size()
    torch.manual_seed(int(fill) + mesh.get_local_rank())
    local = ao.to_nf4(torch.randn(rows, 64), 64, 4)
    # What each rank computes of its own rows is its own, as it is of a whole that is cut.
    local.scaler_mean.fill_(fill)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size([64, 64]), stride=(64, 1)
    )


@pytest.mark.soak
def test_a_sharded_nf4_weight_and_moment_come_back(tmp_path: Path) -> None:
    run_ranks(2, nf4_comes_back, str(tmp_path))


def nf4_comes_back(url: str) -> None:
    models: list[tuple[dict[str, Any], Any]] = []
    for fill in (1.0, 2.0):
        model: Any = nn.Module()
        model.weight = nn.Parameter(nf4(fill), requires_grad=False)
        models.append(({"model": model, "ema": {"w": nf4(fill + 4)}}, model))
    (saved, first), (live, second) = models
    dist_ckpt.save(saved, url)
    weight = second.weight
    dist_ckpt.load(live, url)
    assert second.weight is weight
    pairs = [(first.weight, second.weight), (saved["ema"]["w"], live["ema"]["w"])]
    for left, right in pairs:
        for name, inner in inner_tensors(left, "w").items():
            assert torch.equal(inner.to_local(), inner_tensors(right, "w")[name].to_local()), name
