"""A small training run that can be killed and resumed, and that writes down all it does."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

import dist_ckpt

STEPS, EVERY = 30, 5
SAMPLES, GLOBAL_BATCH = 120, 8


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        layout: "plain", "ddp" or "fsdp2".
        optimizer: "adamw", "sgd" or "fused".
        schedule: "one_cycle" or "cosine".
        workers: of the DataLoader.
    """

    layout: str
    optimizer: str
    schedule: str
    workers: int = 2

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return 1 if self.layout == "plain" else 2


class Augmented:
    """Samples that look different each time: random noise, drawn where the sample is made."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        x = torch.sin(torch.arange(6) * (index + 1.0)) + 0.1 * torch.randn(6)
        return index, x, x.sum().reshape(1)


def train(root: str, log: str, recipe: Recipe, killed_after: int | None) -> None:
    """Train from the newest checkpoint in `root` to the end, or until this process is killed.

    Args:
        root: the run.
        log: a directory; each rank appends a line for each step to a file of its own.
        recipe: what to train.
        killed_after: the step after which every rank kills itself; None to train to the end.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(7 + rank)
    model, plain = _model(recipe)
    optimizer = _optimizer(recipe, model)
    scheduler = _schedule(recipe, optimizer)
    sampler = dist_ckpt.ElasticSampler(SAMPLES, global_batch=GLOBAL_BATCH)
    loader: Any = DataLoader(
        sampler.repeatable(Augmented()),
        batch_sampler=sampler,
        num_workers=recipe.workers,
        # As in a program of its own; ranks of these tests would import torch for each worker.
        multiprocessing_context="fork" if recipe.workers else None,
    )
    state = dist_ckpt.TrainState(
        model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler
    )
    with (
        dist_ckpt.Checkpointer(root, state, every_steps=EVERY, timeout_seconds=600) as ckpt,
        (Path(log) / f"rank{rank}.jsonl").open("a") as lines,
    ):
        start = ckpt.restore()
        batches: Iterator[Any] = sampler.batches(loader)
        for step in range(start + 1, STEPS + 1):
            ids, x, y = next(batches)
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            line = {"step": step, "ids": ids.tolist(), "loss": loss.item().hex()}
            line["lr"] = optimizer.param_groups[0]["lr"].hex()
            print(json.dumps(line), file=lines, flush=True)
            ckpt.step(step)
            if step == killed_after:
                ckpt.wait()  # which step is the newest is then certain
                if recipe.ranks > 1:
                    dist.barrier()  # and every rank knows it
                _kill_everything()
        # Whatever would make the next step another one is in here.
        line = {"step": STEPS + 1, "end": _digest(plain, optimizer), "draw": _draw()}
        print(json.dumps(line), file=lines, flush=True)


def read_log(log: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return by rank and step what the last process that came to it wrote down."""
    return {
        path.stem: {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in sorted(log.iterdir())
    }


def _kill_everything() -> None:
    # A DataLoader raises here when a worker of its dies, and this process would outlive it.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # As a scheduler does it: workers left behind would look for their parent every 5 s only.
    for worker in multiprocessing.active_children():
        worker.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _model(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)
    )
    if recipe.layout == "fsdp2":
        mesh = init_device_mesh("cpu", (recipe.ranks,))
        fully_shard(model[3], mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped: nn.Module = DistributedDataParallel(model) if recipe.layout == "ddp" else model
    return wrapped, model


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=0.01, momentum=0.9)
    return AdamW(groups, lr=0.01, fused=recipe.optimizer == "fused")


def _schedule(recipe: Recipe, optimizer: Optimizer) -> LRScheduler:
    if recipe.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 5)
    return CosineAnnealingLR(optimizer, T_max=STEPS)


def _digest(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    tensors = dict(model.state_dict())
    # In the order of the groups: that of `state` is the order in which gradients came first.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        entries = optimizer.state[parameter]
        tensors |= {f"{i}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return {
        name: hashlib.sha256(_local(tensor).detach().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _draw() -> list[float]:
    return torch.rand(3).tolist()
