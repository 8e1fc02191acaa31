"""Checkpoints written by stock `torch.distributed.checkpoint`, of the nets with known content."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.lr_scheduler import StepLR

from dist_ckpt import TrainState
from dist_ckpt.dcp import Writer
from tests.distributed.nets import Training, build

FORMS = ("nested", "flat", "app")
EPOCH = 3
_LAST_EPOCH = 7


class AppState:
    """Everything in one object, as the tutorials of torch have it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return both."""
        return {
            "model": get_model_state_dict(self.model),
            "optim": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: only stock DCP would ask."""


def scheduler_of(training: Training, last_epoch: int = _LAST_EPOCH) -> StepLR:
    """Return a scheduler of that training that has come as far as `last_epoch`."""
    scheduler = StepLR(training.optimizer, step_size=3)
    scheduler.last_epoch = last_epoch
    return scheduler


def save_all(root: str, layouts: tuple[str, ...]) -> None:
    """Write a checkpoint in each of `layouts` and each form, and a run of the same."""
    for layout in layouts:
        training = build(layout)
        model, optimizer = training.model, training.optimizer
        scheduler = scheduler_of(training)
        for form in FORMS:
            options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
            state: dict[str, Any] = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
                "scheduler": scheduler,
                "epoch": EPOCH,
            }
            if form == "app":
                state = {"app": AppState(model, optimizer)}
            path = Path(root) / name_of(layout, form)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of saving alone, and of its own calls
                save(state, checkpoint_id=path)
                save(state, storage_writer=Writer(Path(root) / name_of(layout, form, run=True)))


def name_of(layout: str, form: str, *, run: bool = False) -> str:
    """Return what the directory of a checkpoint is called, or the run that a Writer made."""
    return f"{layout}-{form}-run" if run else f"{layout}-{form}"


def state_of(training: Training, scheduler: StepLR, form: str) -> TrainState:
    """Return the state that takes what was saved in that form."""
    model, optimizer = training.model, training.optimizer
    if form == "app":
        return TrainState(rng=None, model=model, optim=optimizer)
    return TrainState(rng=None, model=model, optimizer=optimizer, scheduler=scheduler, epoch=0)
