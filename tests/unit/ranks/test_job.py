"""Which steps a job may save: new ones, and again those that its restore found damaged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import AlreadyExists, ErrorKind, FencedError, IntegrityError, UsageError
from dist_ckpt.format.names import manifest_key
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline, SoloCoordinator
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule

_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-job-{next(_names)}")


def state(value: int = 0) -> dict[str, Any]:
    return {"weights": {"w": torch.full((100,), float(value))}, "count": {"n": value}}


def save(ckpt: dist_ckpt.Checkpointer, values: dict[str, Any], step: int) -> None:
    values["weights"]["w"].fill_(step)
    values["count"]["n"] = step
    ckpt.save(step).wait()


def run_of(root: Path, *steps: int) -> Repository:
    for step in steps:
        dist_ckpt.save(state(step), str(root), step=step)
    return Repository(LocalStore(root))


def damage(root: Path, *steps: int) -> None:
    """Flip one bit of the tensor data of each step."""
    for step in steps:
        for path in root.glob(f"step-{step:010}/*/weights.*"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)


def test_a_committed_step_is_not_saved_again(tmp_path: Path) -> None:
    run_of(tmp_path, 3, 5)
    for step in (5, 3):
        with pytest.raises(AlreadyExists, match=f"step {step} is already committed") as caught:
            dist_ckpt.save(state(), str(tmp_path), step=step)
        assert caught.value.kind == ErrorKind.STEP_EXISTS


def test_a_step_behind_the_newest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    repository = run_of(tmp_path, 5)
    with dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt:
        with pytest.raises(UsageError, match="older than the newest checkpoint") as caught:
            ckpt.save(4)
        assert caught.value.kind == ErrorKind.STEP_BEHIND
        for advice in ("continue from step 5", "another run"):
            assert advice in str(caught.value)
        assert "delete" not in str(caught.value), "it may be a good one"
        # Whoever takes the newer one away all the same need not start the program again.
        repository.store.delete([manifest_key(5)])
        first = ckpt.save(4)
        assert ckpt.save(4) is first, "what this very job saved is done"
        with pytest.raises(UsageError, match="continue from step 4"):
            ckpt.save(2)
    assert repository.steps() == [4]


@pytest.mark.parametrize("step", [-1, True, 1.0, "3", None, 10**10])
def test_what_is_no_step_is_refused(step: Any, tmp_path: Path) -> None:
    with dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt:
        with pytest.raises(UsageError, match="bad step"):
            ckpt.save(step)
        ckpt.save(1).wait()
    assert Repository(LocalStore(tmp_path)).steps() == [1]


def begin_all(job: Job, steps: Iterable[int]) -> None:
    for step in steps:
        job.begin(step)
        job.committed(step)


def test_a_steady_save_asks_storage_nothing_to_begin() -> None:
    store = CrashStore(new_store())
    job = Job(store, timeout_seconds=600)
    begin_all(job, [1])
    asked = len(store.operations)
    begin_all(job, range(2, 50))
    assert len(store.operations) == asked


def test_a_job_that_was_replaced_commits_nothing() -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as old:
        old.save(1).wait()
        dist_ckpt.save(state(), store, step=2)
        with pytest.raises(FencedError):
            old.save(3).wait()
    assert Repository(store).steps() == [1, 2]


@pytest.mark.parametrize("step", [2, 3])
def test_steps_that_were_passed_over_are_saved_again(step: int, tmp_path: Path) -> None:
    repository = run_of(tmp_path, 1, 2, 3)
    damage(tmp_path, 2, 3)
    values = state()
    with dist_ckpt.Checkpointer(str(tmp_path), values) as ckpt:
        assert ckpt.restore() == 1
        save(ckpt, values, step)
        assert ckpt.save(step).outcome == "committed"
        save(ckpt, values, 4)
    assert repository.steps() == [1, 2, 3, 4]
    assert repository.verify(step).ok
    loaded = state()
    assert dist_ckpt.load(loaded, str(tmp_path), step=step).step == step
    assert (loaded["weights"]["w"] == step).all()
    fresh = state()
    with dist_ckpt.Checkpointer(str(tmp_path), fresh) as ckpt:
        assert ckpt.restore() == 4


def test_the_damaged_one_is_what_there_is_until_the_new_one_is_whole(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    damage(tmp_path, 2)
    before = (tmp_path / manifest_key(2)).read_bytes()
    failing = FaultyStore(
        LocalStore(tmp_path), [Rule("put", Fail(OSError("lost")), key="*/index.msgpack")]
    )
    values = state()
    with dist_ckpt.Checkpointer(failing, values) as ckpt:
        assert ckpt.restore() == 1
        with pytest.raises(dist_ckpt.CheckpointError):
            save(ckpt, values, 2)
        assert (tmp_path / manifest_key(2)).read_bytes() == before
        save(ckpt, values, 2)
    assert Repository(LocalStore(tmp_path)).verify(2).ok


def test_a_job_that_was_replaced_does_not_replace_what_it_passed_over(tmp_path: Path) -> None:
    repository = run_of(tmp_path, 1, 2)
    damage(tmp_path, 2)
    before = (tmp_path / manifest_key(2)).read_bytes()
    with dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt:
        assert ckpt.restore() == 1
        repository.claim()
        with pytest.raises(FencedError):
            ckpt.save(2).wait()
    assert (tmp_path / manifest_key(2)).read_bytes() == before


def test_a_job_that_passed_nothing_over_replaces_nothing(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    damage(tmp_path, 2)
    with dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt:
        with pytest.raises(IntegrityError):
            ckpt.restore(step=2)
        with pytest.raises(AlreadyExists):
            ckpt.save(2)


class Patient(SoloCoordinator):
    """Notes how long it is given to leave."""

    patience_seconds = 0.0

    def leave(self, deadline: Deadline) -> None:
        self.patience_seconds = deadline.span_seconds


@pytest.mark.parametrize("fails", [False, True])
def test_who_ends_by_an_exception_hardly_waits_for_the_others(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Patient()
    monkeypatch.setattr("dist_ckpt.ranks.job.SoloCoordinator", lambda: coordinator)

    def train() -> None:
        with dist_ckpt.Checkpointer(new_store(), state()) as ckpt:
            ckpt.save(1).wait()
            if fails:
                raise LookupError("training failed")

    if fails:
        with pytest.raises(LookupError):
            train()
    else:
        train()
    assert (coordinator.patience_seconds < 10) is fails
