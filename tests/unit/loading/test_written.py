"""Torch knows of a load: a backward pass over values that are gone is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import dist_ckpt
from dist_ckpt.testing.ranks import ranks
from tests.unit.lifecycle.training import new_store

GONE = "modified by an inplace operation"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 2))


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("on_disk", [True, False])
def test_gradients_of_weights_that_a_load_replaced_are_refused(
    tmp_path: Path, on_disk: bool
) -> None:
    place: Any = tmp_path if on_disk else new_store()
    model = net()
    dist_ckpt.save({"model": model}, place)
    loads: list[Callable[[], object]] = [
        lambda: dist_ckpt.load({"model": model}, place),
        lambda: dist_ckpt.load({"model": model.state_dict()}, place),
        lambda: dist_ckpt.load_weights(model, place),
    ]
    for load in loads:
        loss = model(torch.ones(1, 4)).sum()
        load()
        with pytest.raises(RuntimeError, match=GONE):
            loss.backward()
    model(torch.ones(1, 4)).sum().backward()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_under_dcp_too() -> None:
    store = new_store()
    state = {"w": torch.ones(3, 3)}
    dist_ckpt.save({"state": state}, store)
    tensor = torch.zeros(3, 3)
    before = tensor._version
    dcp_load({"state.w": tensor}, storage_reader=dist_ckpt.dcp.Reader(store), no_dist=True)
    assert tensor.tolist() == state["w"].tolist()
    assert tensor._version > before


def test_whatever_is_filled_in_place_counts_as_written() -> None:
    model = net()
    optimizer = stepped(model)
    value = {"mean": [torch.zeros(2)]}
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    state = {"model": model, "optimizer": optimizer, "value": value, "of": {"none": uncounted}}
    store = new_store()
    dist_ckpt.save(state, store)
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    counted = [*model.parameters(), *moments, value["mean"][0]]
    before = [tensor._version for tensor in counted]
    uncounted.numpy()[:] = 1
    dist_ckpt.load(state, store)
    assert all(tensor._version > was for tensor, was in zip(counted, before, strict=True))
    assert uncounted.tolist() == [0, 0]


@ranks(2)
def test_of_tensors_that_several_ranks_have_together(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    model = parallelize_module(net(), mesh, plan)
    dist_ckpt.save({"model": model}, tmp_path)
    loss = model(torch.ones(1, 4)).sum()
    dist_ckpt.load({"model": model}, tmp_path)
    with pytest.raises(RuntimeError, match=GONE):
        loss.backward()
    model(torch.ones(1, 4)).sum().backward()
