"""A rank fails in any phase of a save, or differs: one error everywhere, and training goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dist_ckpt
from dist_ckpt.errors import CheckpointError, ErrorKind
from dist_ckpt.repository import Repository
from dist_ckpt.saving import attempt
from dist_ckpt.saving.snapshot import Stager
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from dist_ckpt.testing.ranks import run_ranks

T = TypeVar("T")

WORLD, FAILING = 3, 1


class Counter:
    """Something stateful that can be made to fail when it is asked for its state."""

    fails = False

    def state_dict(self) -> dict[str, int]:
        if self.fails:
            raise RuntimeError("no state today")
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def planning(counter: Counter) -> AbstractContextManager[object]:
    return mock.patch.object(counter, "fails", new=True)


def staging(counter: Counter) -> AbstractContextManager[object]:
    return mock.patch.object(Stager, "stage", side_effect=MemoryError("no memory today"))


def reporting(counter: Counter) -> AbstractContextManager[object]:
    return mock.patch.object(attempt, "pack", side_effect=ValueError("no words today"))


# Each with what the rank itself raises: as it was where it happened.
PHASES: dict[str, tuple[Callable[[Counter], AbstractContextManager[object]], type[Exception]]] = {
    "planning": (planning, RuntimeError),
    "staging": (staging, MemoryError),
    "reporting": (reporting, ValueError),
}


def fail_in_every_phase(root: str) -> list[tuple[str, list[int], str]]:
    counter = Counter()
    parts: dict[str, Any] = {"weights": {"w": torch.arange(100_000.0)}, "counter": counter}
    found = []
    with dist_ckpt.Checkpointer(root, parts, timeout_seconds=600) as ckpt:
        for step, (phase, (fault, own)) in zip((10, 20, 30), PHASES.items(), strict=True):
            fails = dist.get_rank() == FAILING
            with fault(counter) if fails else nullcontext():
                with pytest.raises(own if fails else CheckpointError) as caught:
                    ckpt.save(step).wait()
                error = caught.value
                ranks = sorted(error.ranks) if isinstance(error, CheckpointError) else [FAILING]
                found.append((phase, ranks, "today" if "today" in str(error) else str(error)))
                # Nobody saved, and the group of the training works as if nothing had been.
                dist.barrier()
            assert step not in Repository(LocalStore(root)).steps()
            total = torch.ones(())
            dist.all_reduce(total)
            assert total == WORLD
            ckpt.save(step + 1).wait()
            dist.barrier()
    return found


def test_a_rank_that_raises_in_any_phase_is_named_on_all(tmp_path: Path) -> None:
    results = run_ranks(WORLD, fail_in_every_phase, str(tmp_path), timeout_seconds=600)
    assert results[0] == results[1] == results[2]
    for phase, ranks, message in results[0]:
        assert ranks == [FAILING], (phase, message)
        assert message == "today", phase
    assert Repository(LocalStore(tmp_path)).steps() == [11, 21, 31]


class Deadly(StoreWrapper):
    """The process dies when it comes to put a shard."""

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        if operation == "put" and key.endswith(".safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        return run()


def lose_a_rank(root: str) -> tuple[list[int], str]:
    store: Any = LocalStore(root)
    if dist.get_rank() == FAILING:
        store = Deadly(store)
    ckpt = dist_ckpt.Checkpointer(store, {"n": {"w": torch.ones(300_000)}}, timeout_seconds=3600)
    # At once: by the deadline this test would long have ended by its own.
    with pytest.raises(CheckpointError) as caught:
        ckpt.save(1).wait()
    assert caught.value.kind is ErrorKind.PEER_ABSENT
    ckpt.close()
    return sorted(caught.value.ranks), str(caught.value)


def test_a_rank_that_is_killed_is_named_on_all_others(tmp_path: Path) -> None:
    results = run_ranks(WORLD, lose_a_rank, str(tmp_path), expect_killed=[FAILING])
    assert results[FAILING] is None
    for rank in (0, 2):
        found = results[rank]
        assert found is not None
        assert found[0] == [FAILING]
        assert f"rank {FAILING} did not arrive" in found[1]
    assert Repository(LocalStore(tmp_path)).steps() == []


def change_the_state(root: str) -> None:
    """Add, remove, reshape and re-place tensors between saves; load each step again exactly."""
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    place = dist.tensor.distribute_tensor
    sharded, copied = [dist.tensor.Shard(0)], [dist.tensor.Replicate()]

    def tensor(value: float, rows: int) -> torch.Tensor:
        return torch.arange(rows * 5_000.0).reshape(rows, 5_000) + value

    weights = nn.ParameterDict({"a": tensor(1, 8), "b": place(tensor(2, 7), mesh, sharded)})
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: weights.update({"c": tensor(3, 3)}),
        lambda: weights.pop("a"),
        lambda: weights.update({"b": place(tensor(4, 9), mesh, sharded)}),
        lambda: weights.update({"b": place(tensor(5, 9), mesh, copied)}),
        lambda: weights.update({"b": place(tensor(6, 9), mesh, [dist.tensor.Shard(1)])}),
        lambda: weights.update({"own": tensor(7, 2)}) if rank == 1 else None,
    ]
    expected: list[dict[str, torch.Tensor]] = []
    with dist_ckpt.Checkpointer(root, {"model": weights}, timeout_seconds=600) as ckpt:
        for step, change in enumerate(changes):
            change()
            ckpt.save(step).wait()
            expected.append({name: full(one).detach().clone() for name, one in weights.items()})
    for step, wanted in enumerate(expected):
        found = nn.ParameterDict({name: torch.zeros_like(one) for name, one in wanted.items()})
        dist_ckpt.load({"model": found}, root, step=step)
        for name, one in wanted.items():
            assert torch.equal(found[name], one), f"{name} of step {step}"


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def test_every_change_of_the_state_is_planned_and_loaded_exactly(tmp_path: Path) -> None:
    run_ranks(2, change_the_state, str(tmp_path))
    assert Repository(LocalStore(tmp_path)).steps() == list(range(7))


def drift_apart(root: str, check: bool | None) -> list[str]:
    """Save copies that are equal at first and differ from the second save on."""
    weights = {"even": torch.ones(10), "drifts": torch.ones(200, 200)}
    model = torch.nn.BatchNorm1d(4)  # its buffers may differ under DDP, and are exempt
    said = []
    with dist_ckpt.Checkpointer(
        root, {"weights": weights, "model": model}, timeout_seconds=600, check_replicas=check
    ) as ckpt:
        for step in range(4):
            try:
                ckpt.save(step).wait()
                said.append("")
            except CheckpointError as error:
                said.append(f"{error.kind}: {error}")
            weights["drifts"][5, 5] = dist.get_rank()
            assert model.running_mean is not None
            model.running_mean.fill_(dist.get_rank())
            if step == 2:
                weights["new"] = torch.ones(3)
    return said


@pytest.mark.parametrize(
    ("check", "failing"), [(True, [1, 2, 3]), (None, [3]), (False, [])], ids=str
)
def test_replicas_that_drifted_apart_are_found(
    check: bool | None, failing: list[int], tmp_path: Path
) -> None:
    results = run_ranks(2, drift_apart, str(tmp_path), check)
    assert results[0] == results[1]
    assert [step for step, message in enumerate(results[0]) if message] == failing
    for step in failing:
        assert results[0][step].startswith("replicas_differ: tensor 'value.drifts'")
        assert "other values on rank 0 than on rank 1" in results[0][step]
