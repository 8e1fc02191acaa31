"""Saving changes nothing, and what comes back is what was there, to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dist_ckpt


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 1))


def groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [
        {"params": parameters[:3], "lr": 3e-4, "weight_decay": 0.123},
        {"params": parameters[3:], "betas": (0.8, 0.95), "epoch": 2.5, "tag": "head"},
        {"params": [], "lr": 1e-5},
    ]


def step(module: nn.Module, optimizer: Optimizer) -> float:
    optimizer.zero_grad()
    loss: torch.Tensor = module(torch.randn(16, 5)).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def test_the_next_step_is_the_same_with_and_without_a_save(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = model()
    second = copy.deepcopy(first)
    optimizers = [AdamW(groups(module), lr=1e-3) for module in (first, second)]
    losses = []
    for module, optimizer in zip((first, second), optimizers, strict=True):
        torch.manual_seed(2)
        losses.append([step(module, optimizer) for _ in range(3)])
        if module is second:
            with dist_ckpt.Checkpointer(
                tmp_path, dist_ckpt.TrainState(model=module, optimizer=optimizer)
            ) as ckpt:
                ckpt.save(3)
                losses[-1] += [step(module, optimizer) for _ in range(2)]
        else:
            losses[-1] += [step(module, optimizer) for _ in range(2)]
    assert losses[0] == losses[1]
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_every_value_of_every_group_comes_back_into_fresh_objects(
    tmp_path: Path, kind: type[Optimizer]
) -> None:
    module = model()
    optimizer: Any = kind(groups(module), lr=0.01)  # type: ignore[call-arg]
    scheduler = CosineAnnealingLR(optimizer, T_max=20)
    for _ in range(4):
        step(module, optimizer)
        scheduler.step()
    dist_ckpt.save({"model": module, "optimizer": optimizer, "scheduler": scheduler}, tmp_path)
    kept = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    fresh = model()
    other: Any = kind([{"params": g["params"]} for g in groups(fresh)], lr=0.5)  # type: ignore[call-arg]
    schedule = CosineAnnealingLR(other, T_max=20)
    dist_ckpt.load({"model": fresh, "optimizer": other, "scheduler": schedule}, tmp_path)
    found = [
        {key: value for key, value in group.items() if key != "params"}
        for group in other.param_groups
    ]
    assert found == kept
    assert "initial_lr" in found[0]
    assert found[1]["epoch"] == 2.5
    assert all(type(value) is type(kept[1][key]) for key, value in found[1].items())


def test_the_loss_right_after_a_restore_is_the_loss_right_before_the_save(tmp_path: Path) -> None:
    data = torch.randn(64, 5)

    def evaluate(module: nn.Module) -> float:
        module.eval()
        with torch.no_grad():
            loss: torch.Tensor = module(data).square().mean()
        module.train()
        return loss.item()

    module = model()
    optimizer = AdamW(groups(module), lr=1e-2)
    for _ in range(5):
        step(module, optimizer)
    before = evaluate(module)
    dist_ckpt.save({"model": module, "optimizer": optimizer}, tmp_path)
    for _ in range(5):
        step(module, optimizer)
    assert evaluate(module) != before
    dist_ckpt.load({"model": module, "optimizer": optimizer}, tmp_path)
    assert evaluate(module) - before == 0
    fresh = model()
    dist_ckpt.load({"model": fresh, "optimizer": AdamW(groups(fresh), lr=1.0)}, tmp_path)
    assert evaluate(fresh) - before == 0
