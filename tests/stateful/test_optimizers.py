"""Three steps, a save, fresh objects, a load and three steps are six steps, for every optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ckpt.errors import UsageError
from tests.stateful.optimizers import (
    every_foreign_optimizer,
    foreign_optimizers,
    net,
    resumed_as_if_not_stopped,
    schedulers,
    torch_optimizers,
    train,
)

TORCH, FOREIGN, SCHEDULERS = torch_optimizers(), foreign_optimizers(), schedulers()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    # The networks are so small that threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TORCH)
def test_optimizers_of_torch(tmp_path: Path, name: str) -> None:
    resumed_as_if_not_stopped(tmp_path, TORCH[name])


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore")  # of the packages, about themselves
def test_optimizers_of_others(tmp_path: Path, name: str) -> None:
    resumed_as_if_not_stopped(tmp_path, FOREIGN[name])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of SequentialLR in torch 2.6
def test_schedulers_of_torch(tmp_path: Path, name: str) -> None:
    resumed_as_if_not_stopped(tmp_path, TORCH["SGD momentum"], schedule=SCHEDULERS[name])


def test_every_scheduler_of_torch_is_tried() -> None:
    tried = {name.partition(" ")[0] for name in SCHEDULERS} - {"SWALR"}
    assert tried == set(torch.optim.lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.soak
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("name", TORCH)
def test_every_optimizer_under_every_scheduler(tmp_path: Path, name: str, schedule: str) -> None:
    try:
        SCHEDULERS[schedule](TORCH[name](net()))
    except ValueError as error:
        pytest.skip(f"{schedule} does not take {name}: {error}")
    resumed_as_if_not_stopped(tmp_path, TORCH[name], schedule=SCHEDULERS[schedule])


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_of_others_that_runs_here(tmp_path: Path) -> None:
    kept, refused = [], []
    for name, make in every_foreign_optimizer().items():
        model = net()
        try:
            train(model, make(model), range(2))
        except Exception:
            continue  # it wants a GPU, another kind of parameters, or a closure of its own
        try:
            resumed_as_if_not_stopped(tmp_path / name, make)
        except UsageError as error:
            refused.append(error.message)
        else:
            kept.append(name)
    assert len(kept) > 100
    assert len(refused) < 10
    assert all("cannot store" in message for message in refused)
