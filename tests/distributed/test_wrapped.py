"""Sharded tensors that are several behind one face, and tensors that have grown: resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.spread import inner_tensors
from dist_ckpt.testing.ranks import ranks, run_ranks

ROWS, COLUMNS = 64, 256
# Three ranks cut 64 rows into 22, 22 and 20: the scales are cut just so.
WORLDS = (1, 2, 3)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh)


def content(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole of an inner tensor: a function of its name."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = (torch.arange(count) * 7 + len(name) + sum(map(ord, name))) % 113
    return raw.to(torch.uint8).view(dtype).reshape(shape)


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


def save_all(root: str) -> None:
    for cls in (AdamW8bit, AdamW4bit, AdamWFp8):
        model, optimizer = quantized(cls)
        for name, leaf in leaves(live_state(model, optimizer)).items():
            whole = content(name, tuple(leaf.shape), leaf.dtype)
            assert isinstance(leaf, DTensor)
            fitting = distribute_tensor(whole, leaf.device_mesh, leaf.placements)
            leaf.to_local().copy_(fitting.to_local())
        dist_ckpt.save({"model": model, "optimizer": optimizer}, f"{root}/{cls.__name__}")


def load_all(root: str) -> list[str]:
    wrong = []
    for cls in (AdamW8bit, AdamW4bit, AdamWFp8):
        for fresh in (True, False):
            model, optimizer = quantized(cls)
            if not fresh:
                live_state(model, optimizer)
            dist_ckpt.load({"model": model, "optimizer": optimizer}, f"{root}/{cls.__name__}")
            (parameter,) = model.parameters()
            for name, leaf in leaves(optimizer.state[parameter]).items():
                assert isinstance(leaf, DTensor)
                whole, expected = leaf.full_tensor(), content(name, tuple(leaf.shape), leaf.dtype)
                if not torch.equal(whole.view(torch.uint8), expected.view(torch.uint8)):
                    wrong.append(f"{cls.__name__} {name} {fresh=}")
    return wrong


@pytest.mark.parametrize("worlds", [(2, 3), pytest.param((1, 2, 3, 4), marks=pytest.mark.soak)])
def test_quantized_moments_are_resharded_bit_for_bit(
    worlds: tuple[int, ...], tmp_path: Path
) -> None:
    for saved in worlds:
        run_ranks(saved, save_all, f"{tmp_path}/{saved}")
        for now in worlds:
            if now != saved or len(worlds) > 2:
                assert run_ranks(now, load_all, f"{tmp_path}/{saved}") == [[]] * now


def nf4(fill: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 64 // mesh.size()
    torch.manual_seed(int(fill) + mesh.get_local_rank())
    local = to_nf4(torch.randn(rows, 64), 64, 4)
    # What each rank computes of its own rows is its own, as it is of a whole that is cut.
    local.scaler_mean.fill_(fill)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size([64, 64]), stride=(64, 1)
    )


@ranks(2)
def test_a_sharded_nf4_weight_and_moment_come_back() -> None:
    url, models = "memory://wrapped-nf4", []
    for fill in (1.0, 2.0):
        model = nn.Module()
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


class Grown(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.head = nn.Linear(4, rows)
        self.register_buffer("embed_count", torch.arange(float(rows)) + 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)).square().sum()  # type: ignore[no-any-return]


def build(rows: int, fill: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(Grown(rows))
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
            optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.full_like(parameter, fill),
                "exp_avg_sq": torch.full_like(parameter, fill),
            }
    return model, optimizer


def first_column(tensor: Any) -> list[float]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    column = whole if whole.ndim == 1 else whole[:, 0]
    return [float(each) for each in column]


def load_grown(root: str) -> None:
    for rows, rule in ((11, "pad"), (5, "crop"), (11, "overlap")):
        model, optimizer = build(rows, 2.0)
        state = {"model": model, "optimizer": optimizer}
        report = dist_ckpt.load(state, root, resize={"*embed*": rule, "model/head.*": rule})
        both = min(rows, 8)
        expected = [1.0] * both + [2.0] * (rows - both)
        assert first_column(model.embed.weight) == expected
        assert first_column(model.head.bias) == expected
        assert first_column(model.embed_count) == [100.0 + row for row in range(rows)]
        for key in ("exp_avg", "exp_avg_sq"):
            assert first_column(optimizer.state[model.embed.weight][key]) == expected
            assert first_column(optimizer.state[model.head.weight][key]) == expected
        assert len(report.resized) == 10
        assert "the rest of" in str(report)
        fresh = sharded(Grown(rows))
        begun = torch.optim.AdamW(fresh.parameters())
        dist_ckpt.load(
            {"model": fresh, "optimizer": begun}, root, resize={"model": rule, "*head*": rule}
        )
        expected = [1.0] * both + [0.0] * (rows - both)
        assert first_column(begun.state[fresh.embed.weight]["exp_avg"]) == expected
        other = "crop" if rows > 8 else "pad"
        with pytest.raises(IncompatibleError, match="more than resize="):
            dist_ckpt.load(state, root, resize={"*": other})


def save_grown(root: str) -> None:
    model, optimizer = build(8, 1.0)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root)


def test_grown_and_shrunk_tensors_are_loaded_in_part_and_resharded(tmp_path: Path) -> None:
    run_ranks(2, save_grown, str(tmp_path))
    run_ranks(3, load_grown, str(tmp_path))
