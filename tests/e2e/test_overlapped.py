"""Staging beside the training: what is stored is the state at the call, whatever training does."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt.errors import CheckpointError
from dist_ckpt.repository import Repository
from dist_ckpt.staging import arena
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks


def copy_as_late_as_allowed(patch: pytest.MonkeyPatch) -> list[str]:
    """Let copies in flight begin only when the training thread waits for them; note each."""
    asked = threading.Event()
    late: list[str] = []
    copy_all, before_change = arena.copy_all, arena.HostCopying.before_change

    def copy_late(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread().name == "dist_ckpt-copy":
            asked.wait()
            asked.clear()
            late.append("copied")
        copy_all(*args, **kwargs)

    def ask(self: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            asked.set()
        before_change(self)

    patch.setattr(arena, "copy_all", copy_late)
    patch.setattr(arena.HostCopying, "before_change", ask)
    return late


class Training:
    """A model with buffers, its optimizer, and what they were when they were saved."""

    def __init__(self, wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None) -> None:
        torch.manual_seed(3)
        net = torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 2)
        )
        self.model: torch.nn.Module = net if wrap is None else wrap(net)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.net = net
        self.state = dist_ckpt.TrainState(model=self.model, optimizer=self.optimizer, rng=None)
        self.was: dict[int, Any] = {}

    def now(self) -> dict[str, Any]:
        return copy.deepcopy(
            {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        )

    def train(self) -> None:
        self.model(torch.randn(16, 8)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_and_save(self, url: Path | str, steps: int) -> None:
        with dist_ckpt.Checkpointer(url, self.state, every_steps=1, staging="overlapped") as ckpt:
            for step in range(1, steps + 1):
                self.train()
                self.was[step] = self.now()
                ckpt.step(step)
            self.train()  # the last save has its copies in flight, too

    def check(self, url: Path | str, was: dict[int, Any]) -> None:
        for step, wanted in was.items():
            dist_ckpt.load(self.state, url, step=step)
            found = self.now()
            for name, tensor in wanted["model"].items():
                assert torch.equal(found["model"][name], tensor), (step, name)
            for number, kept in wanted["optimizer"].items():
                for key, value in kept.items():
                    assert torch.equal(found["optimizer"][number][key], value), (step, number, key)


def test_steps_right_after_a_save_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    with monkeypatch.context() as patch:
        late = copy_as_late_as_allowed(patch)
        training.train_and_save(tmp_path, 4)
    assert len(late) == 4, "every save had copies that a step waited for"
    changed = training.was[2]["model"]["0.weight"], training.was[3]["model"]["0.weight"]
    assert not torch.equal(*changed)
    mean = training.was[2]["model"]["1.running_mean"], training.was[3]["model"]["1.running_mean"]
    assert not torch.equal(*mean), "the forward pass right after a save changed the buffers"
    training.check(tmp_path, training.was)


def swap_average(training: Training) -> None:
    for parameter in training.net.parameters():
        parameter.data.copy_(torch.zeros_like(parameter))


def reset_moments(training: Training) -> None:
    for kept in training.optimizer.state.values():
        kept["exp_avg"].zero_()
        kept["exp_avg_sq"].data.fill_(1)


def free_memory(training: Training) -> None:
    for parameter in training.net.parameters():
        parameter.untyped_storage().resize_(0)


def load_other_weights(training: Training) -> None:
    training.net.load_state_dict(Training().net.state_dict())


def clamp(training: Training) -> None:
    with torch.no_grad():
        for parameter in training.net.parameters():
            parameter.clamp_(-1e-3, 1e-3)


def start_optimizer_anew(training: Training) -> None:
    training.optimizer.state.clear()


@pytest.mark.parametrize(
    "change",
    [swap_average, reset_moments, free_memory, load_other_weights, clamp, start_optimizer_anew],
)
def test_writes_between_a_save_and_the_next_step_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Training], None]
) -> None:
    training = Training()
    training.train()
    was = {1: training.now()}
    with monkeypatch.context() as patch:
        late = copy_as_late_as_allowed(patch)
        with dist_ckpt.Checkpointer(tmp_path, training.state, staging="overlapped") as ckpt:
            ckpt.save(1)
            change(training)
            torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
    assert late == ["copied"], "only after the change"
    fresh = Training()
    fresh.train()
    fresh.check(tmp_path, was)


def shard(net: torch.nn.Module) -> torch.nn.Module:
    fully_shard(net)
    return net


def train_on_ranks(root: str) -> dict[int, Any]:
    patch = pytest.MonkeyPatch()
    late = copy_as_late_as_allowed(patch)
    replicated = Training(DistributedDataParallel)
    torch.manual_seed(dist.get_rank())  # other data on each rank
    replicated.train_and_save(f"{root}/ddp", 3)
    sharded = Training(shard)
    sharded.train_and_save(f"{root}/fsdp", 3)
    patch.undo()
    assert len(late) == 6
    sharded.check(f"{root}/fsdp", sharded.was)
    dist.barrier()
    return replicated.was


def test_ranks_under_ddp_and_fsdp_store_the_state_at_the_call(tmp_path: Path) -> None:
    was = run_ranks(2, train_on_ranks, str(tmp_path))
    Training().check(tmp_path / "ddp", was[0])


def fail_in_flight(root: str) -> str:
    training = Training(DistributedDataParallel)
    training.train()
    patch = pytest.MonkeyPatch()
    with dist_ckpt.Checkpointer(root, training.state, staging="overlapped") as ckpt:
        original = arena.copy_all

        def broken(*args: Any, **kwargs: Any) -> None:
            if threading.current_thread().name == "dist_ckpt-copy" and dist.get_rank() == 1:
                raise RuntimeError("the device is gone")
            original(*args, **kwargs)

        patch.setattr(arena, "copy_all", broken)
        handle = ckpt.save(1)
        training.train()  # a step never hears of it
        # As it was where it happened, and named on the other rank.
        own = RuntimeError if dist.get_rank() == 1 else CheckpointError
        with pytest.raises(own, match="device is gone") as error:
            handle.wait()
        patch.undo()
        ckpt.save(2).wait()
    return str(sorted(getattr(error.value, "ranks", ())))


def test_a_copy_that_fails_fails_the_save_on_all_ranks_and_no_step(tmp_path: Path) -> None:
    assert run_ranks(2, fail_in_flight, str(tmp_path)) == ["[1]", "[]"]
    assert Repository(LocalStore(tmp_path)).steps() == [2]


def interrupt_staging(root: str) -> list[int]:
    training = Training(DistributedDataParallel)
    training.train()
    original = arena.copy_all

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        original(*args, **kwargs)

    ckpt = dist_ckpt.Checkpointer(root, training.state, memory_limit_bytes=1 << 20)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(arena, "copy_all", interrupted)
            ckpt.save(1)
    else:
        with pytest.raises(CheckpointError, match="KeyboardInterrupt"):
            ckpt.save(1).wait()
    try:
        ckpt.wait()
    except CheckpointError:
        assert dist.get_rank() == 1
    ckpt.save(2).wait()
    ckpt.close()
    return Repository(LocalStore(root)).steps()


def test_an_interrupt_while_staging_is_told_to_all_and_the_next_save_works(tmp_path: Path) -> None:
    assert run_ranks(2, interrupt_staging, str(tmp_path)) == [[2], [2]]


def test_a_process_that_ends_with_copies_in_flight_has_saved(tmp_path: Path) -> None:
    script = (
        "import torch, dist_ckpt\n"
        "net = torch.nn.Linear(64, 64)\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=1.0)\n"
        "torch.nn.init.ones_(net.weight)\n"
        "ckpt = dist_ckpt.Checkpointer(\n"
        f"    {str(tmp_path)!r}, dict(model=net, optimizer=optimizer),\n"
        "    staging='overlapped')\n"
        "ckpt.save(1)\n"
        "ckpt.save(2)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    net = torch.nn.Linear(64, 64)
    state = {"model": net, "optimizer": torch.optim.SGD(net.parameters(), lr=1.0)}
    dist_ckpt.load(state, tmp_path, step=2)
    assert torch.equal(net.weight.detach(), torch.ones(64, 64))
    assert Repository(LocalStore(tmp_path)).steps() == [1, 2]
