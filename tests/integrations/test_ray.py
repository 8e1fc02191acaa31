"""A training by Ray Train on two workers of this host, ended and gone on with."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("ray.train")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from dist_ckpt.integrations.ray import Reports, run_of_experiment


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


def test_what_was_committed_is_reported_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers import torch and this package first, which a busy machine takes its time for.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    monkeypatch.setenv("PYTHONPATH", str(Path(dist_ckpt.__file__).parents[1]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        losses = []
        for fails in False, True:
            trainer = TorchTrainer(
                work,
                train_loop_config={"fails": fails},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(
                    name=f"fails-{fails}",
                    storage_path=str(tmp_path),
                    failure_config=FailureConfig(max_failures=1),
                ),
            )
            result = trainer.fit()
            run = tmp_path / f"fails-{fails}" / "run"
            assert result.checkpoint is not None
            assert result.checkpoint.path == str(run / "step-0000000008")
            assert result.metrics is not None
            assert result.metrics["began"] == (4 if fails else 0)
            assert dist_ckpt.Run(str(run)).steps() == [2, 4, 6, 8]
            losses.append(result.metrics["loss"])
            model = torch.nn.Linear(4, 1)
            assert dist_ckpt.load_weights(model, result.checkpoint.path).step == 8
        assert losses[0] == losses[1]
    finally:
        ray.shutdown()
