"""Ranks decide together when to save, and what is the best, whatever each of them was told."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt import Checkpointer, EarlyStopping, TrainState, events, keep, policy
from dist_ckpt.errors import CheckpointError, CoordinationError, FencedError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.testing.ranks import run_ranks

WORLD = 2
LOSS = "val/loss"


def rank() -> int:
    return torch.distributed.get_rank()


def train(root: str, start: int, losses: list[float]) -> dict[str, Any]:
    """Take a step for each loss; rank 1 believes in other losses, and gets a signal at the end."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stopper = EarlyStopping(LOSS, patience=3)
    state = TrainState(model=model, optimizer=optimizer, stopper=stopper)
    found: list[events.Event] = []
    events.subscribe(found.append)
    when = policy.on_signal(signal.SIGUSR1) | policy.every(seconds=3600)
    kept = keep.latest(1)
    best: dict[int, torch.Tensor] = {}
    with Checkpointer(root, state, when=when, keep=kept, timeout_seconds=600) as ckpt:
        assert ckpt.restore() == start
        before = stopper.state_dict()
        for step, loss in enumerate(losses, start + 1):
            model(torch.randn(2, 4)).sum().backward()  # DDP keeps the ranks in step
            optimizer.step()
            best[step] = model.module.weight.detach().clone()
            # A tensor on rank 0; on rank 1 another number, or nothing at all.
            mine: Any = torch.tensor(loss) if rank() == 0 else -100.0 - step
            ckpt.step(step, metrics={LOSS: mine} if rank() == 0 or step % 2 else None)
            if stopper.should_stop:
                break
        if start:
            os.kill(os.getpid(), signal.SIGUSR1) if rank() == 1 else None
            while not ckpt.signaled:
                step += 1
                model(torch.randn(2, 4)).sum().backward()
                ckpt.step(step)
        rolled = ckpt.rollback()
        same = rolled not in best or torch.equal(model.module.weight, best[rolled])
    return {
        "before": before,
        "stopper": stopper.state_dict(),
        "stopped": stopper.should_stop,
        "rolled": rolled,
        "same": same,
        "signaled": ckpt.signaled,
        "step": step,
        "weight": model.module.weight.detach().clone(),
        "differ": [each for each in found if isinstance(each, events.MetricsDiffer)],
    }


def test_early_stopping_over_restarts_with_rank_0s_metrics(tmp_path: Path) -> None:
    root = str(tmp_path)
    first = run_ranks(WORLD, train, root, 0, [5.0, 2.0])
    # Interrupted after the best; then it gets no better three times.
    second = run_ranks(WORLD, train, root, 2, [3.0, math.nan, 2.0])
    for results in (first, second):
        for name in ("before", "stopper", "stopped", "rolled", "signaled", "step"):
            assert results[0][name] == results[1][name], "all ranks know the same"
        assert torch.equal(results[0]["weight"], results[1]["weight"])
        assert [each["same"] for each in results] == [True, True]
    assert first[0]["rolled"] == second[0]["rolled"] == 2
    assert torch.equal(first[0]["weight"], second[0]["weight"]), "the best, bit for bit"
    assert second[0]["before"] == first[0]["stopper"]
    assert (second[0]["stopper"]["best_score"], second[0]["stopped"]) == (2.0, True)
    assert second[0]["signaled"] == "SIGUSR1"
    # Said once by rank 0, though it happened at each save.
    assert [len(results[0]["differ"]) for results in (first, second)] == [1, 0]
    assert first[0]["differ"][0].stored == 5.0
    assert first[0]["differ"][0].other == -101.0
    assert first[1]["differ"] == []

    records = Repository(resolve(root)).records()
    # The best, and the one of the signal.
    assert [(each.step, each.metrics) for each in records] == [
        (2, {LOSS: 2.0}),
        (second[0]["step"], {}),
    ]
    manifest = Repository(resolve(root)).open(2).manifest
    assert manifest.origin["hosts"] == [socket.gethostname()]


def be_replaced(root: str) -> str:
    """Save, be replaced by another job meanwhile, and try to save again."""
    with Checkpointer(root, {"n": 1}, timeout_seconds=600) as ckpt:
        ckpt.save(1).wait()
        if rank() == 0:
            Repository(resolve(root)).claim()
        torch.distributed.barrier()
        with pytest.raises(FencedError) as caught:
            ckpt.save(2).wait()
    return str(caught.value)


def test_a_job_that_was_replaced_is_told_by_whom_on_every_rank(tmp_path: Path) -> None:
    told = run_ranks(WORLD, be_replaced, str(tmp_path))
    assert len(set(told)) == 1
    assert "superseded by claim 2" in told[0]
    assert "must stop" in told[0]
    # The other one is in another process, and goes on.
    dist_ckpt.save({"n": 1}, str(tmp_path), step=2)
    (other,) = run_ranks(1, fenced_by_another_process, str(tmp_path))
    assert f"process {os.getpid()} on {socket.gethostname()}" in other


def fenced_by_another_process(root: str) -> str:
    repository = Repository(resolve(root))
    with pytest.raises(FencedError) as caught:
        repository.begin(9, 1)
    return str(caught.value)


def break_one_rank(root: str) -> tuple[str, list[int]]:
    """Let rank 1 leave out a call that rank 0 makes: nobody may hang."""
    logging.disable(logging.WARNING)
    ckpt = Checkpointer(root, {"n": 1}, when=policy.better(LOSS), timeout_seconds=10)
    error: CheckpointError | None = None
    try:
        if rank() == 0:
            ckpt.step(1, metrics={LOSS: "low"})  # type: ignore[dict-item]
        else:
            ckpt.step(1)
    except CheckpointError as found:
        error = found
    assert error is not None
    if rank() == 1:
        with pytest.raises(CoordinationError) as late:
            ckpt.step(2)  # rank 0 never gets here
        assert late.value.ranks == {0: "said nothing"}
    return type(error).__name__, Repository(resolve(root)).steps()


def test_what_goes_wrong_on_rank_0_is_heard_by_all(tmp_path: Path) -> None:
    assert run_ranks(WORLD, break_one_rank, str(tmp_path)) == [("UsageError", [])] * WORLD
