"""Ray Train's own reports and ours, on two workers of this host that hold replicas of one model."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train import CheckpointUploadMode, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import dist_ckpt
from benchmarks.trainers_beside import EVERY, STEPS, Clock, Side, beside, newest_step
from benchmarks.workload import State
from dist_ckpt.integrations.ray import Reports, run_of_experiment

# Gives what saves a step, and what goes on from the newest one and returns its number.
_Way = Callable[[State], AbstractContextManager[tuple[Any, Any]]]

_WORKERS = 2
_FILE = "state.pt"


def measure(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure its uploads, which the training waits for or not, and ours; all are kept."""
    ways: dict[str, tuple[_Way, Callable[[Path], Path]]] = {
        "Ray": (partial(_theirs, CheckpointUploadMode.SYNC), _newest_uploaded),
        "Ray async": (partial(_theirs, CheckpointUploadMode.ASYNC), _newest_uploaded),
        "dist_ckpt": (_ours, lambda out: newest_step(out / "experiment" / "run")),
    }
    sides = [
        Side(
            name,
            partial(_train, way, chosen.scale),
            newest,
            partial(_resume, way, chosen.scale),
            ours=way is _ours,
        )
        for name, (way, newest) in ways.items()
    ]
    with _cluster():
        return beside("Ray Train, whole model", sides, place, repeats=chosen.repeats)


def _newest_uploaded(out: Path) -> Path:
    # Called by the time, to the microsecond; beside them is a file that Ray keeps of them all.
    return max(out.glob("experiment/checkpoint_[0-9]*"))


@contextmanager
def _cluster() -> Iterator[None]:
    # Workers import torch and this package first, which a busy machine takes its time for.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    # Ray takes one report at each look at its workers, each 2 s by default, and a second one waits
    # for that: here saves are nearer to each other than in a training that is one.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    folder = str(Path(dist_ckpt.__file__).parents[1])
    ray.init(
        num_cpus=_WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": folder}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _train(way: _Way, scale: float, out: Path, clock: Clock) -> None:
    _, blocked = _fitted(way, scale, out)
    clock.blocked += blocked


def _resume(way: _Way, scale: float, out: Path) -> int:
    step, _ = _fitted(way, scale, out)
    return step


def _fitted(way: _Way, scale: float, out: Path) -> tuple[int, list[float]]:
    """Train to the end; return the step that it went on from, and what `Clock` took of rank 0."""
    trainer = TorchTrainer(
        partial(_work, way, scale),
        scaling_config=ScalingConfig(num_workers=_WORKERS),
        run_config=RunConfig(name="experiment", storage_path=str(out.absolute())),
    )
    found: tuple[int, list[float]] = trainer.fit().return_value
    return found


def _work(way: _Way, scale: float) -> tuple[int, list[float]]:
    training, clock = State(scale), Clock()
    with way(training) as (save, restore):
        start = restore()
        for step in range(start + 1, STEPS + 1):
            for parameter in training.model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
            training.optimizer.step()
            if step % EVERY == 0:
                with clock.saving():
                    save(step)
    return start, clock.blocked


@contextmanager
def _theirs(mode: CheckpointUploadMode, training: State) -> Iterator[tuple[Any, Any]]:
    def save(step: int) -> None:
        checkpoint = None
        if train.get_context().get_world_rank() == 0:
            folder = tempfile.mkdtemp()
            torch.save({"step": step, **training.state_dict()}, Path(folder, _FILE))
            checkpoint = train.Checkpoint.from_directory(folder)
        train.report(
            {},
            checkpoint=checkpoint,
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )

    def restore() -> int:
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, _FILE))  # noqa: TID251  # what is measured
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        step: int = state["step"]
        return step

    yield save, restore


@contextmanager
def _ours(training: State) -> Iterator[tuple[Any, Any]]:
    state = dist_ckpt.TrainState(model=training.model, optimizer=training.optimizer)
    with dist_ckpt.Checkpointer(run_of_experiment(), state) as ckpt, Reports() as reports:
        yield lambda step: reports.add(ckpt.save(step), {}), ckpt.restore
