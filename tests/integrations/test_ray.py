"""A training by Ray Train on two workers of this host, ended and gone on with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import dist_ckpt
from tests.services.s3 import S3Service

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("ray.train")
    import ray
    from ray import train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, prepare_data_loader

    from dist_ckpt.integrations.ray import Reports, run_of_experiment, url_of


SAMPLES = 24


def work(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = dist_ckpt.TrainState(model=model, optimizer=optimizer)
    run = run_of_experiment()
    with dist_ckpt.Checkpointer(run, state, every_steps=2) as ckpt, Reports() as reports:
        start = ckpt.restore()
        for step in range(start + 1, 9):
            loss = model(torch.full((2, 4), step / 10)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reports.add(ckpt.step(step), {"loss": float(loss.detach()), "began": start})
            if step == 5 and start == 0 and config["fails"]:
                ckpt.wait()
                os._exit(1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this host, whose workers see what the environment says now."""
    # Workers import torch and this package first, which a busy machine takes its time for.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    monkeypatch.setenv("PYTHONPATH", str(Path(dist_ckpt.__file__).parents[1]))
    # Two workers, and one that reads for Ray Data.
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def trained(storage_path: str, *, fails: bool) -> train.Result:
    """Train to the end, in an experiment of its own; if it `fails`, a worker ends on the way."""
    trainer = TorchTrainer(
        work,
        train_loop_config={"fails": fails},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=f"fails-{fails}",
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=1),
        ),
    )
    return trainer.fit()


def check(storage_path: str) -> None:
    """Train without and with a failure, and compare what Ray was told with what there is."""
    losses = []
    for fails in False, True:
        result = trained(storage_path, fails=fails)
        run = f"{storage_path}/fails-{fails}/run"
        assert result.checkpoint is not None
        assert url_of(result.checkpoint) == f"{run}/step-0000000008"
        assert result.metrics is not None
        assert result.metrics["began"] == (4 if fails else 0)
        assert dist_ckpt.Run(run).steps() == [2, 4, 6, 8]
        losses.append(result.metrics["loss"])
        model = torch.nn.Linear(4, 1)
        assert dist_ckpt.load_weights(model, url_of(result.checkpoint)).step == 8
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("cluster")
def test_what_was_committed_is_reported_and_gone_on_from(tmp_path: Path) -> None:
    check(str(tmp_path))


def take_samples(config: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Take samples in batches of the size that `config` says; return those of each worker.

    Those by our sampler first, then those by a shard of Ray Data.
    """
    torch.manual_seed(0)
    sampler = dist_ckpt.ElasticSampler(SAMPLES, global_batch=config["batch"])
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_sampler=sampler)
    loader = prepare_data_loader(loader, add_dist_sampler=False)
    state = dist_ckpt.TrainState(model=torch.nn.Linear(4, 1), sampler=sampler)
    taken: list[int] = []
    run = run_of_experiment()
    with dist_ckpt.Checkpointer(run, state, every_steps=1) as ckpt, Reports() as reports:
        steps = range(ckpt.restore() + 1, config["until"] + 1)
        for step, (batch,) in zip(steps, sampler.batches(loader), strict=False):
            taken += batch.tolist()
            reports.add(ckpt.step(step), {})
    shard = train.get_dataset_shard("train")
    of_shard = [row["id"] for row in shard.iter_rows()]
    of_workers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_workers, (taken, of_shard))
    return of_workers


@pytest.mark.usefixtures("cluster")
def test_another_batch_takes_each_sample_once_but_those_of_a_shard_come_again(
    tmp_path: Path,
) -> None:
    taken: list[int] = []
    for until, batch in (3, 4), (5, 6):
        trainer = TorchTrainer(
            take_samples,
            train_loop_config={"until": until, "batch": batch},
            datasets={"train": ray.data.range(SAMPLES)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="batches", storage_path=str(tmp_path)),
        )
        of_workers = trainer.fit().return_value
        for ours, _ in of_workers:
            assert len(ours) == SAMPLES // 4
            taken += ours
        assert sorted(each for _, shard in of_workers for each in shard) == list(range(SAMPLES))
    assert sorted(taken) == list(range(SAMPLES))
    assert dist_ckpt.Run(str(tmp_path / "batches/run")).steps() == [1, 2, 3, 4, 5]


@pytest.fixture
def s3_for_ray(s3_service: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes by pyarrow, which else sends checksums that older servers do not understand."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")


# The server before the cluster, whose workers take its address from the environment.
@pytest.mark.usefixtures("s3_for_ray", "cluster")
@pytest.mark.timeout(1800)
def test_an_experiment_on_s3_has_its_run_there(s3_service: S3Service, s3_name: str) -> None:
    check(s3_service.url(s3_name))
    elsewhere = [key for key in s3_service.keys(s3_name) if "/run/" not in key]
    assert not [key for key in elsewhere if key.endswith(".safetensors")], "Ray copied nothing"
