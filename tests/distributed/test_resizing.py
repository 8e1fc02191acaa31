"""Tensors that have grown or shrunk since they were saved: loaded in part, and resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.testing.ranks import run_ranks


def sharded(model: Any) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


class Grown(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.head = nn.Linear(4, rows)
        self.register_buffer("embed_count", torch.arange(float(rows)) + 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)).square().sum()  # type: ignore[no-any-return]


def build(rows: int, fill: float) -> tuple[Any, torch.optim.Optimizer]:
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
    whole = whole.detach()
    column = whole if whole.ndim == 1 else whole[:, 0]
    return [float(each) for each in column]


PAD, OTHERS = ((11, "pad"),), ((5, "crop"), (11, "overlap"))


def load_grown(root: str, rules: Any) -> None:
    for rows, rule in rules:
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
        other: Any = "crop" if rows > 8 else "pad"
        with pytest.raises(IncompatibleError, match="more than resize="):
            dist_ckpt.load(state, root, resize={"*": other})


def save_grown(root: str) -> None:
    model, optimizer = build(8, 1.0)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root)


@pytest.mark.parametrize("rules", [PAD, pytest.param(OTHERS, marks=pytest.mark.soak)])
def test_grown_and_shrunk_tensors_are_loaded_in_part_and_resharded(
    rules: Any, tmp_path: Path
) -> None:
    run_ranks(1, save_grown, str(tmp_path))
    run_ranks(2 if rules is PAD else 3, load_grown, str(tmp_path), rules)


def test_patterns_that_match_nothing_and_unknown_rules_are_errors(tmp_path: Path) -> None:
    dist_ckpt.save({"model": Grown(8)}, str(tmp_path))
    live = Grown(9)
    with pytest.raises(UsageError, match=r"'\*emebd\*' .*\(did you mean 'embed'"):
        dist_ckpt.load_weights(live, str(tmp_path), resize={"*emebd*": "pad"})
    rule: Any = "padd"
    with pytest.raises(UsageError, match="'pad', 'crop', 'overlap', not 'padd'"):
        dist_ckpt.load_weights(live, str(tmp_path), resize={"*": rule})
    with pytest.raises(IncompatibleError, match="resize="):
        dist_ckpt.load_weights(live, str(tmp_path))
    with torch.device("meta"):
        bare = Grown(9)
    with pytest.raises(IncompatibleError, match="on the meta device, where there is no rest"):
        dist_ckpt.load_weights(bare, str(tmp_path), resize={"*": "pad"})


def test_an_object_and_a_plain_value_take_what_both_have(tmp_path: Path) -> None:
    dist_ckpt.save({"ema": {"embed": torch.ones(3)}, "model": nn.Linear(1, 1)}, str(tmp_path))
    live = {"embed": torch.zeros(5)}
    kept = live["embed"]
    state = {"ema": live, "model": nn.Linear(1, 1)}
    dist_ckpt.load(state, str(tmp_path), resize={"*embed": "pad"})
    assert live["embed"] is kept
    assert kept.tolist() == [1, 1, 1, 0, 0]
