"""The way that is named to whoever has modules of FSDP1: torch names what they flatten."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import dist_ckpt
from dist_ckpt.dcp import Reader, Writer
from dist_ckpt.testing.ranks import run_ranks


def trained() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def save_and_load(root: str, use_orig_params: bool) -> list[str]:
    warnings.simplefilter("ignore")  # it warns of itself and of what it calls

    def flat() -> tuple[nn.Module, Any]:
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(
            trained()[0], device_id=cpu, use_orig_params=use_orig_params
        )
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = flat()
    step(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optim": moments}, storage_writer=Writer(root, step=1))
    fresh, other = flat()
    weights, moments = get_state_dict(fresh, other)
    state: dict[str, Any] = {"model": weights, "optim": moments}
    load(state, storage_reader=Reader(root))
    set_state_dict(fresh, other, model_state_dict=state["model"], optim_state_dict=state["optim"])
    with (
        FullyShardedDataParallel.summon_full_params(model),
        FullyShardedDataParallel.summon_full_params(fresh),
    ):
        pairs = zip(model.parameters(), fresh.parameters(), strict=True)
        return ["weights"] * (not all(torch.equal(one, two) for one, two in pairs))


@pytest.mark.soak
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_what_torch_names_of_fsdp1_loads_anywhere(use_orig_params: bool, tmp_path: Path) -> None:
    assert run_ranks(2, save_and_load, str(tmp_path), use_orig_params) == [[], []]
    model, optimizer = trained()
    dist_ckpt.load({"model": model, "optimizer": optimizer, "rng": None}, tmp_path)
    expected, moments = trained()
    step(expected, moments)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(optimizer.state[one]["exp_avg"], moments.state[two]["exp_avg"])
