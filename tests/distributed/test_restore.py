"""All ranks restore one checkpoint, or fail with one error."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CheckpointError, IncompatibleError, IntegrityError
from dist_ckpt.format.names import step_dir
from dist_ckpt.repository.history import delete_checkpoint
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.unit.saving.test_beside_retention import Meanwhile

WORLD = 3


def parts(fill: float) -> dict[str, Any]:
    return {"weights": {"w": torch.full((30, 20_000), fill)}, "count": {"n": int(fill)}}


def save_steps(root: str, *steps: int) -> None:
    for step in steps:
        dist_ckpt.save(parts(step), root, step=step)


def restore(root: str) -> tuple[int, dict[int, str], float]:
    state = dist_ckpt.TrainState(**parts(0))
    with dist_ckpt.Checkpointer(root, state, timeout_seconds=600) as ckpt:
        step = ckpt.restore()
        assert ckpt.restored is not None
        assert (state["weights"]["w"] == step).all()
        assert state["count"] == {"n": step}
        return step, dict(ckpt.restored.refused), ckpt.restored.seconds


def restore_failing(root: str) -> tuple[str, str]:
    with dist_ckpt.Checkpointer(root, parts(0), timeout_seconds=600) as ckpt:
        with pytest.raises(CheckpointError) as caught:
            ckpt.restore()
        return type(caught.value).__name__, str(caught.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    run_ranks(WORLD, save_steps, str(tmp_path), 1, 2, 3)
    # Step 3 is damaged in the data that only one rank wants first, step 2 is cut short.
    (victim,) = tmp_path.glob("step-0000000003/*/weights.r00002.safetensors")
    flip(victim)
    (short,) = tmp_path.glob("step-0000000002/*/weights.r00001.safetensors")
    short.write_bytes(short.read_bytes()[:-1])
    results = run_ranks(WORLD, restore, str(tmp_path))
    for step, refused, _ in results:
        assert step == 1
        assert "weights.r00002" in refused[3]
        assert "weights.r00001" in refused[2]
        assert refused == results[0][1], "every rank tells the same story"


def load_while_it_is_collected(root: str, spare: str) -> tuple[int, dict[int, str]]:
    store = Meanwhile(LocalStore(root), "read_into", "weights.r")
    if dist.get_rank() == 1:

        def go_on() -> None:
            """Do what the job does that owns the run: commit the next one, delete this one."""
            Path(spare, step_dir(3)).rename(Path(root, step_dir(3)))
            delete_checkpoint(LocalStore(root), 2)

        store.then = go_on
    state = parts(0)
    report = dist_ckpt.load(state, store, timeout_seconds=600)
    assert (state["weights"]["w"] == report.step).all()
    return report.step, dict(report.refused)


def test_all_ranks_go_on_to_what_is_newer_when_theirs_is_collected(tmp_path: Path) -> None:
    root, spare = str(tmp_path / "run"), str(tmp_path / "spare")
    run_ranks(2, save_steps, root, 1, 2)
    run_ranks(2, save_steps, spare, 3)
    assert run_ranks(2, load_while_it_is_collected, root, spare) == [(3, {})] * 2


def test_when_all_are_damaged_every_rank_is_told(tmp_path: Path) -> None:
    run_ranks(WORLD, save_steps, str(tmp_path), 1, 2)
    for path in tmp_path.glob("step-*/*/weights.r00000.safetensors"):
        flip(path)
    results = run_ranks(WORLD, restore_failing, str(tmp_path))
    assert {name for name, _ in results} == {IntegrityError.__name__}
    assert len(set(results)) == 1
    assert "step 1: " in results[0][1]
    assert "step 2: " in results[0][1]


def load_with_one_rank_different(root: str) -> tuple[str, str, bool]:
    net = torch.nn.Linear(4, 3)
    if dist.get_rank() == 1:
        net.register_buffer("surplus", torch.zeros(2))
    before = net.weight.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        dist_ckpt.load({"model": net}, root)
    unchanged = torch.equal(net.weight, before)
    return type(caught.value).__name__, str(caught.value), unchanged


def save_linear(root: str) -> None:
    torch.manual_seed(1)
    dist_ckpt.save({"model": torch.nn.Linear(4, 3)}, root)


def test_what_does_not_fit_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    run_ranks(WORLD, save_linear, str(tmp_path))
    results = run_ranks(WORLD, load_with_one_rank_different, str(tmp_path))
    for name, message, unchanged in results:
        assert name == IncompatibleError.__name__
        assert "missing in the checkpoint: model/surplus" in message
        assert unchanged


class Broken:
    """A part that refuses its state on one rank."""

    def state_dict(self) -> dict[str, int]:
        return {"value": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if dist.get_rank() == 2:
            raise ValueError("rank 2 will not have it")


def restore_broken(root: str) -> str:
    with dist_ckpt.Checkpointer(root, {"part": Broken()}, timeout_seconds=600) as ckpt:
        ckpt.save(1).wait()
        with pytest.raises(CheckpointError) as caught:
            ckpt.restore()
        assert list(caught.value.ranks) == [2]
        return str(caught.value)


def test_a_part_that_refuses_on_one_rank_fails_every_rank(tmp_path: Path) -> None:
    results = run_ranks(WORLD, restore_broken, str(tmp_path))
    assert len(set(results)) == 1
    assert "rank 2 will not have it" in results[0]


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def save_generators(root: str) -> list[float]:
    seed = 100 + dist.get_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    dist_ckpt.save({"count": {"n": 1}}, root)
    return draws()


def load_generators(root: str) -> list[float]:
    dist_ckpt.load({"count": {"n": 0}}, root)
    return draws()


def test_generators_go_on_per_rank_and_are_independent_elsewhere(tmp_path: Path) -> None:
    expected = run_ranks(2, save_generators, str(tmp_path))
    assert expected[0] != expected[1]
    assert run_ranks(2, load_generators, str(tmp_path)) == expected
    elsewhere = run_ranks(3, load_generators, str(tmp_path))
    assert run_ranks(3, load_generators, str(tmp_path)) == elsewhere, "well defined"
    streams = {tuple(each) for each in (*expected, *elsewhere)}
    assert len(streams) == 5, "no two ranks draw the same"
