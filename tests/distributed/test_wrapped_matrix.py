"""Weights of quantizing libraries: saved over so many ranks, loaded over so many others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dist_ckpt
from dist_ckpt.dcp import Reader, Writer
from dist_ckpt.state.layout import shard_like
from dist_ckpt.testing.ranks import run_ranks
from tests import quantized as ao
from tests.distributed.scaled import same

ROWS, COLUMNS = 64, 128
WORLDS = (1, 2, 4)


def configured(config: str) -> Any:
    def make(weight: torch.Tensor) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
        model[0].weight = nn.Parameter(weight)
        ao.quantize_(model, getattr(ao, config)())
        made: torch.Tensor = model[0].weight.detach()
        return made

    return make


def float8_training(weight: torch.Tensor) -> Any:
    kind, scale = ao.WeightWithDynamicFloat8CastTensor, torch.tensor(2.0)
    return kind(weight, ao.LinearMMConfig(), torch.float8_e4m3fn, scale)


KINDS: dict[str, Any] = {
    "int8 training": lambda weight: ao.Int8QuantizedTrainingLinearWeight.from_float(weight),
    "int8": configured("Int8WeightOnlyConfig"),
    "float8": configured("Float8WeightOnlyConfig"),
    "nf4": lambda weight: ao.to_nf4(weight, 64, 16),
    "float8 training": float8_training,
}
STOCK = ("nf4", "float8 training")
"""Those that torch's own planning of saves can take when they are sharded."""


def whole(kind: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    made: torch.Tensor = KINDS[kind](torch.randn(ROWS, COLUMNS))
    return made


def cut(value: torch.Tensor) -> DTensor:
    """Shard `value` by rows, as the class itself cuts them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = ROWS // mesh.size()
    with torch.no_grad():
        try:
            local = torch.split(value, rows)[mesh.get_local_rank()]
        except NotImplementedError:  # it is sharded by slices only
            local = value.narrow(0, rows * mesh.get_local_rank(), rows)
    like = distribute_tensor(torch.zeros(value.shape, dtype=value.dtype), mesh, [Shard(0)])
    return shard_like(like, local)


def save_all(root: str) -> None:
    size = dist.get_world_size()
    for kind in KINDS:
        state = {"m": {"w": cut(whole(kind, 1))}}
        dist_ckpt.save(state, f"{root}/{kind}-ours-{size}")
        if kind in STOCK:
            save(state, storage_writer=Writer(f"{root}/{kind}-stock-{size}"))
            continue
        # These ask something of their class before any storage is asked.
        for writer in (Writer(f"{root}/none"), FileSystemWriter(f"{root}/none-of-stock")):
            with pytest.raises(
                CheckpointException, match=r"unimplemented operator|ZeroDivisionError"
            ):
                save(state, storage_writer=writer)


def load_all(root: str, saved: int) -> list[str]:
    wrong = []
    for kind in KINDS:
        for wrote, way in (("ours", "ours"), ("stock", "ours"), ("stock", "stock")):
            if wrote == "stock" and kind not in STOCK:
                continue
            live = {"m": {"w": cut(whole(kind, 2))}}
            url = f"{root}/{kind}-{wrote}-{saved}"
            if way == "ours":
                dist_ckpt.load(live, url, skip=["rng"])
            else:
                load(live, storage_reader=Reader(url))
            if not same(live["m"]["w"], cut(whole(kind, 1))):
                wrong.append(f"{kind} {wrote} {way}")
    return wrong


@pytest.mark.soak
def test_quantized_weights_are_resharded_bit_for_bit(tmp_path: Path) -> None:
    for saved in WORLDS:
        run_ranks(saved, save_all, str(tmp_path))
    for saved in WORLDS:
        for now in WORLDS:
            assert run_ranks(now, load_all, str(tmp_path), saved) == [[]] * now


def replicated(seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(COLUMNS, ROWS, bias=False)
    return model, ao.bnb_AdamW8bit(model.parameters(), lr=0.125)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, COLUMNS)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_replicated(url: str) -> None:
    model, optimizer = replicated(1)
    step(model, optimizer)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, url)


def go_on(url: str) -> bool:
    model, optimizer = replicated(1)
    step(model, optimizer)
    live, other = replicated(2)
    dist_ckpt.load({"model": live, "optimizer": other}, url)
    step(model, optimizer)
    step(live, other)
    return torch.equal(live.weight, model.weight)  # type: ignore[arg-type]


@pytest.mark.soak
def test_moments_in_bytes_go_on_at_another_world_size(tmp_path: Path) -> None:
    """These of bitsandbytes step plain tensors only: their own code refuses DTensors."""
    run_ranks(2, save_replicated, str(tmp_path))
    for size in (1, 2, 3):
        assert run_ranks(size, go_on, str(tmp_path)) == [True] * size
