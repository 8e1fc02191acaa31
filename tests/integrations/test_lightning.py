"""Lightning as its users know it, its checkpoints in runs as everybody's are."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import NotFound, UsageError
from dist_ckpt.testing.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from dist_ckpt.integrations.lightning import (
        DistCkptDDPStrategy,
        DistCkptIO,
        DistCkptModelParallelStrategy,
        DistCkptSingleDeviceStrategy,
        as_file,
        newest,
    )
    from tests.integrations import lightning_runs as runs
    from tests.integrations.lightning_runs import Sharded, Small, equal, fit, state_of, trainer

# Lightning gives advice by warnings: workers of loaders, loggers, what it calls itself.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums as the rank processes have them, which are given one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(run: Path) -> set[str]:
    return {path.name for path in run.glob("*.ckpt")}


def steps(run: Path) -> list[int]:
    return dist_ckpt.Run(str(run)).steps()


def checkpoints(by: Trainer) -> ModelCheckpoint:
    found = by.checkpoint_callback
    assert isinstance(found, ModelCheckpoint)
    return found


def test_top_k_best_and_last_are_those_of_lightning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    by = trainer(run, 4)
    at = {}

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            at[trainer.global_step] = state_of(pl_module)

    by.callbacks.insert(0, Watch())
    fit(by, Small(scores=[3.0, 1.0, 2.0, 4.0]))
    assert names(run) == {"epoch=1-step=16.ckpt", "epoch=2-step=24.ckpt", "last.ckpt"}
    assert steps(run) == [16, 24], "last is a name of the newest of them, and no copy"
    assert checkpoints(by).best_model_path == str(run / "epoch=1-step=16.ckpt")
    listed = dist_ckpt.Run(str(run))
    assert listed.best("val_loss") == 16
    model = Small()
    assert dist_ckpt.load_weights(model, run, step="best", metric="val_loss").step == 16
    assert equal(state_of(model), at[16])
    model = Small()
    by.validate(model, torch.utils.data.DataLoader(runs.data()), ckpt_path="best", verbose=False)
    assert equal(state_of(model), at[16])
    loaded = Small.load_from_checkpoint(as_file(run / "last.ckpt"), weights_only=False)
    assert equal(state_of(loaded), at[24])


def die_in_a_save(run: str, strategy: str) -> None:
    warnings.simplefilter("ignore")

    def die(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == 24:
            os.kill(os.getpid(), signal.SIGKILL)

    events.subscribe(die)
    chosen = DistCkptSingleDeviceStrategy() if strategy else "auto"
    fit(trainer(run, 4, strategy=chosen))


@pytest.mark.parametrize("strategy", ["", "strategy"])
def test_a_run_killed_in_a_save_goes_on_as_if_it_had_not_stopped(
    strategy: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole = fit(trainer(tmp_path / "whole", 4, strategy=of(strategy)))
    run_ranks(1, die_in_a_save, str(run), strategy, expect_killed=[0])
    assert steps(run) == [8, 16]
    again = fit(trainer(run, 4, strategy=of(strategy)), resume="last", seed=7)
    assert again.losses == whole.losses[-len(again.losses) :]
    assert again.losses[0][0] == 16
    assert equal(state_of(again), state_of(whole))


def of(strategy: str) -> Any:
    return DistCkptSingleDeviceStrategy() if strategy else "auto"
