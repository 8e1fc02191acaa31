"""Optimizers that were stored in another form than their own: nothing of it is damage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.optim import SGD, AdamW

import dist_ckpt
from dist_ckpt.dcp import Writer
from dist_ckpt.errors import IncompatibleError


def trained(kind: type[torch.optim.Optimizer] = AdamW) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def by_torch_save(model: nn.Module, optimizer: Any, place: Path) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, place / "f.pt")


def by_stock(model: nn.Module, optimizer: Any, place: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    stock_save(state, checkpoint_id=place)


def by_writer(model: nn.Module, optimizer: Any, place: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    stock_save(state, storage_writer=Writer(place))


def by_writer_named(model: nn.Module, optimizer: Any, place: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    stock_save({"model": weights, "optimizer": moments}, storage_writer=Writer(place))


def by_writer_flat(model: nn.Module, optimizer: Any, place: Path) -> None:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=flat)
    stock_save({"model": weights, "optimizer": moments}, storage_writer=Writer(place))


def as_a_copy(model: nn.Module, optimizer: Any, place: Path) -> None:
    state = {"model": model, "optimizer": optimizer.state_dict(), "rng": None}
    dist_ckpt.save(state, place)


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (by_torch_save, "state_dict"),
        (by_stock, "state_dict"),
        (by_writer, "state_dict"),
        (by_writer_named, "state_dict"),
        (by_writer_flat, "state_dict"),
        (as_a_copy, "a copy"),
    ],
)
def test_another_form_is_said_and_no_damage(
    write: Any, says: str, kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        saved, optimizer = trained(kind)
        write(saved, optimizer, tmp_path)
    place = tmp_path / "f.pt" if write is by_torch_save else tmp_path
    model, optimizer = trained(kind)
    before = [each.clone() for each in model.parameters()]
    state = {"model": model, "optimizer": optimizer, "rng": None}
    with pytest.raises(IncompatibleError, match=says) as caught:
        dist_ckpt.load(state, place)
    for word in ("optimizer", "skip=['optimizer']", "open_checkpoint"):
        assert word in str(caught.value)
    assert "missing in the checkpoint" not in str(caught.value)
    assert all(map(torch.equal, before, model.parameters()))
    dist_ckpt.load(state, place, skip=["optimizer"])
    assert all(map(torch.equal, saved.parameters(), model.parameters()))
