"""A training by Lightning that is small and draws random numbers: dropout, and shuffled batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dist_ckpt.integrations.lightning import DistCkptIO, RandomState

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


class Small(LightningModule):
    """A regression; what it validates to is told by `scores`, one an epoch, or gets better."""

    def __init__(self, scores: Sequence[float] = (), *, dropout: float = 0.3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1)
        )
        self.scores = tuple(scores)
        self.losses: list[tuple[int, float]] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        self.losses.append((self.global_step, loss.item()))
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        epoch = self.current_epoch
        score = self.scores[epoch] if epoch < len(self.scores) else -float(epoch)
        self.log("val_loss", score, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Sharded(Small):
    """The same, sharded by FSDP2 over all ranks."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def data() -> Dataset[Any]:
    return TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))


def trainer(
    run: Path | str,
    epochs: int,
    *,
    strategy: Any = "auto",
    plugin: DistCkptIO | None = None,
    devices: int = 1,
    callbacks: Sequence[Callback] = (),
    **checkpoints: Any,
) -> Trainer:
    """Return a trainer that saves to `run`: by `DistCkptIO`, unless by a strategy."""
    options = {"save_top_k": 2, "monitor": "val_loss", "save_last": True, **checkpoints}
    by_plugin = strategy == "auto"
    return Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=epochs,
        strategy=strategy,
        plugins=[plugin or DistCkptIO()] if by_plugin else None,
        callbacks=[
            ModelCheckpoint(dirpath=str(run), **options),
            *([RandomState()] if by_plugin else []),
            *callbacks,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(
    by: Trainer,
    model: Small | None = None,
    *,
    seed: int = 1,
    resume: str | Path | None = None,
    shuffle: bool = True,
    make: Callable[[], Small] = Small,
) -> Small:
    """Train from a seed, or from a checkpoint whatever the seed."""
    seed_everything(seed, verbose=False)
    model = model or make()
    loader = DataLoader(data(), batch_size=4, shuffle=shuffle)
    by.fit(model, loader, DataLoader(data(), batch_size=16), ckpt_path=resume)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
