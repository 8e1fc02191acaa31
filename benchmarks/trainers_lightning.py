"""Lightning's own files, written in the background or not, and ours in their place."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from benchmarks.trainers_beside import (
    EVERY,
    STEPS,
    Clock,
    Side,
    beside,
    newest_numbered,
    newest_step,
)
from benchmarks.trainers_transformers import gpt2, rows
from dist_ckpt.integrations.lightning import DistCkptIO, DistCkptSingleDeviceStrategy, newest_in

_Chosen = Callable[[], dict[str, Any]]


def measure(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure a `ModelCheckpoint` that keeps all, as it is and with what saves in its place."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ways: dict[str, _Chosen] = {
        "Lightning": dict,
        "Lightning AsyncCheckpointIO": lambda: {"plugins": [AsyncCheckpointIO()]},
        "dist_ckpt plugin": lambda: {"plugins": [DistCkptIO()]},
        "dist_ckpt strategy": lambda: {"strategy": DistCkptSingleDeviceStrategy()},
    }
    sides = []
    for name, way in ways.items():
        ours = name.startswith("dist_ckpt")
        newest = newest_step if ours else _newest_file
        sides.append(Side(name, *_train_and_resume(way, chosen.scale, newest), ours=ours))
    return beside("Lightning, whole model", sides, place, repeats=chosen.repeats)


class _Gpt2(LightningModule):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net = gpt2(scale)
        self.began: int | None = None

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def on_train_start(self) -> None:
        self.began = self.global_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def _train_and_resume(
    way: _Chosen, scale: float, newest: Callable[[Path], Path]
) -> tuple[Any, Any, Any]:
    def fit(out: Path, clock: Clock, resume: str | None = None) -> int | None:
        class Timed(Trainer):
            """Notes how long each save holds up the training."""

            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                with clock.saving():
                    super().save_checkpoint(*args, **kwargs)

        # Without a `last.ckpt`, which Lightning writes a second time, or as a link to a file that
        # its AsyncCheckpointIO has not written yet.
        saves = ModelCheckpoint(dirpath=str(out), every_n_train_steps=EVERY, save_top_k=-1)
        by = Timed(
            accelerator="cpu",
            max_steps=STEPS,
            callbacks=[saves],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **way(),
        )
        model = _Gpt2(scale)
        loader: DataLoader[Any] = DataLoader(rows().unbind())  # type: ignore[arg-type]
        by.fit(model, loader, ckpt_path=resume)
        return model.began

    def resume(out: Path) -> int:
        own = newest is _newest_file
        began = fit(out, Clock(), resume=str(newest(out)) if own else newest_in(out))
        if began is None:
            raise RuntimeError("nothing was trained")
        return began

    return fit, newest, resume


_newest_file = partial(newest_numbered, pattern="*step=*.ckpt")
