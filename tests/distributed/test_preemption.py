"""The end that comes from outside: one commit by all ranks, in the time that there is."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dist_ckpt import Checkpointer, TrainState, policy
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import FaultyStore, Hang, Rule

WORLD = 2


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Training:
    """A model that all ranks train, and the handler of a program that was there before."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(nn.Linear(4, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = TrainState(model=self.model, optimizer=self.optimizer)
        self.heard: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: self.heard.append(number))

    def step(self) -> None:
        self.model(torch.randn(2, 4)).sum().backward()
        self.optimizer.step()


def evaluate(root: str) -> dict[str, Any]:
    """Rank 1 gets SIGTERM in the middle of an evaluation, with the workers of a loader alive."""
    training = Training()
    data = TensorDataset(torch.arange(64.0).reshape(16, 4))
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    when = policy.on_signal(grace_seconds=600, exit_code=75)
    seen = 0
    with Checkpointer(root, training.state, when=when, timeout_seconds=600) as ckpt:
        assert ckpt.restore() == 0
        for step in (1, 2):
            training.step()
            ckpt.step(step)
        while not ckpt.signaled:
            for (batch,) in loader:
                seen += len(batch)
                if seen == 4 and dist.get_rank() == 1:
                    terminate()
                ckpt.step(2)  # told again, so that an evaluation need not come to its end
        signaled = ckpt.signaled
        # The launcher sends it to each rank as well, and to some of them twice.
        terminate()
    return {
        "unseen": seen % len(data),
        "signaled": (signaled, ckpt.signaled),
        "exit_code": ckpt.exit_code,
        "heard": len(training.heard),
        "steps": Repository(resolve(root)).steps(),
    }


def test_sigterm_on_one_rank_in_an_evaluation(tmp_path: Path) -> None:
    first, second = run_ranks(WORLD, evaluate, str(tmp_path))
    assert first == {
        "unseen": 0,
        "signaled": ("SIGTERM", "SIGTERM"),
        "exit_code": 75,
        "heard": 1,
        "steps": [2],
    }
    assert second == {**first, "heard": 2}
    manifest = Repository(resolve(str(tmp_path))).open(2).manifest
    assert manifest.origin["reason"] == "signal SIGTERM"


class Signalling(FaultyStore):
    """A place in which the first read of a file on rank 1 lasts until a signal has come."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        if key.endswith(".safetensors") and dist.get_rank() == 1 and not self._sent:
            self._sent = True
            terminate()
        return super().read_into(key, offset, *buffers)

    _sent = False


def end_in_time(root: str) -> dict[str, Any]:
    """No time is left for another save beside the one that is in flight; a second signal comes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hang = Hang()
    store = FaultyStore(LocalStore(root), [Rule("put", hang, key="*.safetensors")])
    when = policy.on_signal(grace_seconds=1e-6) | policy.at(1)
    training = TrainState(weights={"w": torch.arange(1000.0)})

    def insist() -> None:
        hang.reached.wait()
        terminate()
        hang.release()

    with Checkpointer(store, training, when=when, timeout_seconds=600) as ckpt:
        ckpt.step(1)
        hang.reached.wait()
        dist.barrier()
        terminate() if dist.get_rank() == 0 else None
        begun, step = [], 1
        while not ckpt.signaled:
            step += 1
            begun.append(ckpt.step(step))
            dist.barrier()
        # Nor is the last step saved at the end; and a signal by itself would end this at once.
        thread = threading.Thread(target=insist)
        thread.start()
    thread.join()
    dist.barrier()
    return {
        "begun": any(begun),
        "exit_code": ckpt.exit_code,
        "steps": Repository(resolve(root)).steps(),
        "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    }


def be_told_in_a_restore(root: str) -> dict[str, Any]:
    """A signal during a restore is heeded after the first steps."""
    state = TrainState(weights={"w": torch.zeros(1000)})
    store = Signalling(LocalStore(root), [])
    with Checkpointer(
        store, state, when=policy.on_signal(grace_seconds=600), timeout_seconds=600
    ) as ckpt:
        step = ckpt.restore(exchange="never")
        assert float(state["weights"]["w"][-1]) == 999.0, "it was not cut short"
        while not ckpt.signaled:
            step += 1
            ckpt.step(step)
            dist.barrier()
    return {"step": step, "exit_code": ckpt.exit_code}


def end_and_begin(root: str) -> list[dict[str, Any]]:
    """Do both, one after the other."""
    return [end_in_time(root), be_told_in_a_restore(root)]


def test_what_is_in_flight_is_finished_and_a_restart_hears_its_own_signal(tmp_path: Path) -> None:
    results = run_ranks(WORLD, end_and_begin, str(tmp_path))
    for ended, _ in results:
        assert ended == {
            "begun": False,
            "exit_code": 143,
            "steps": [1],
            "handler": True,
        }
    steps = {restarted["step"] for _, restarted in results}
    assert len(steps) == 1, "all ranks end after the same step"
    assert {restarted["exit_code"] for _, restarted in results} == {143}
    assert Repository(resolve(str(tmp_path))).steps() == [1, *steps]
