"""Jobs beside one another: which is alive, and a training that outlives saves that fail."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ckpt import Checkpointer, events
from dist_ckpt.errors import CheckpointError, ErrorKind, UsageError
from dist_ckpt.repository import Repository, commit
from dist_ckpt.repository.status import JobStatus
from dist_ckpt.run import Run
from dist_ckpt.storage import resolve
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

WORLD = 2
# Three of them without a sign are the end of a job: a busy machine may hold a thread up for one.
EVERY_SECONDS = 0.5


def job(root: str, **options: Any) -> Checkpointer:
    """Return the Checkpointer of a job of this rank alone."""
    options = {"ranks": "alone", "status_seconds": EVERY_SECONDS, **options}
    return Checkpointer(root, {"n": 1}, every_steps=10, timeout_seconds=600, **options)


def status_when(root: str, condition: Any) -> JobStatus:
    """Wait until what the job says of itself meets `condition`."""
    while True:
        found = Run(root).status()
        if found is not None and condition(found):
            return found


def live_beside_one_another(root: str) -> list[str]:
    """Rank 0 trains, is looked at by rank 1, and is killed; then rank 1 takes over."""
    said: list[str] = []
    if dist.get_rank() == 0:
        ckpt = job(root)
        for step in range(ckpt.restore() + 1, 16):
            ckpt.step(step)
        ckpt.wait()
        dist.barrier()
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    found = status_when(root, lambda each: each.commit == 10)
    said.append(f"{found.phase} {found.step} {found.commit} {found.lag_steps} {found.claim}")
    with pytest.raises(UsageError) as caught, job(root, exclusive=True) as ckpt:
        ckpt.restore()
    assert caught.value.kind is ErrorKind.IN_USE
    assert Repository(resolve(root)).latest() == 10
    found = status_when(root, lambda each: each.beat > found.beat + 2)
    said.append(f"claim {found.claim} still")
    dist.barrier()
    # From now on nothing is heard of it, whatever its clock had said.
    with job(root, exclusive=True) as ckpt:
        said.append(f"restored {ckpt.restore()}")
        found = status_when(root, lambda each: each.claim == 2)
    found = status_when(root, lambda each: each.is_over)
    said.append(f"{found.phase} {found.claim}")
    return said


def test_a_job_is_alive_until_nothing_is_heard_of_it(tmp_path: Path) -> None:
    results = run_ranks(WORLD, live_beside_one_another, str(tmp_path), expect_killed={0})
    assert results[1] == [
        "training 15 10 5 1",
        "claim 1 still",
        "restored 10",
        "ended 2",
    ]


def test_a_loop_of_restarts_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    with job(root, status_seconds=None) as ckpt:
        ckpt.save(7)
    heard = []
    for _ in range(4):
        caplog.clear()
        monkeypatch.setattr(commit, "process_names", {})  # as a start of its own has
        with pytest.raises(RuntimeError), job(root) as ckpt:
            assert ckpt.restore() == 7
            raise RuntimeError("out of memory, as at each start")
        heard.append([each for each in caplog.messages if "one after the other" in each])
    assert [len(each) for each in heard] == [0, 0, 1, 1]
    assert heard[3][0].startswith(f"3 starts before this one on {root}")
    assert "each began at step 7" in heard[3][0]
    caplog.clear()
    monkeypatch.setattr(commit, "process_names", {})
    with job(root) as ckpt:
        ckpt.restore()
        ckpt.save(8).wait()
        assert status_when(root, lambda each: each.commit == 8).starts_in_vain == 4
    for _ in range(3):
        with job(root) as ckpt:  # has nothing to do, and ends well
            ckpt.restore()
    assert len(caplog.messages) == 1


def test_a_place_that_takes_no_status_is_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = Fail(OSError("no room"))
    rule = Rule("put", full, key="claims/*.status.json", nth=None)
    store = FaultyStore(LocalStore(str(tmp_path)), [rule])
    with job(store, save_last=True) as ckpt:  # type: ignore[arg-type]
        ckpt.restore()
        while store.fired[0] < 3:
            ckpt.step(1)
    assert [each for each in caplog.messages if "no matter for the training" in each] == (
        caplog.messages
    )
    assert len(caplog.messages) == 1, "said once"
    assert Run(str(tmp_path)).steps() == [1]


def outlive_failures(root: str, broken: list[int]) -> dict[str, Any]:
    """The files of rank 1 cannot be written at some steps: all ranks do the same about it."""
    store: Store = LocalStore(root)
    if dist.get_rank() == 1:
        fault = Fail(MemoryError("on one rank alone"))
        store = FaultyStore(
            store,
            [Rule("put", fault, key=f"step-{s:010d}/*/weights.*", nth=None) for s in broken],
        )
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ckpt").addHandler(handler)
    failed: list[int] = []
    events.subscribe(
        lambda each: failed.append(each.step) if isinstance(each, events.SaveFailed) else None
    )
    raised = ""
    ckpt = Checkpointer(
        store,
        {"weights": {"w": torch.arange(100_000.0)}},
        every_steps=1,
        timeout_seconds=600,
        when_failed="warn",
        max_failures=2,
        save_last=False,
    )
    step = 0
    try:
        for step in range(1, 10):
            ckpt.step(step)
    except (CheckpointError, MemoryError) as error:
        raised = type(error).__name__
    ckpt.close()
    return {
        "step": step,
        "failed": failed,
        "said": len([each for each in said if "training goes on" in each]),
        "raised": raised,
    }


def test_a_rank_whose_saves_fail_ends_the_training_of_none(tmp_path: Path) -> None:
    first, second = run_ranks(WORLD, outlive_failures, str(tmp_path), [2, 4, 6, 7])
    same = {"step": 8, "failed": [2, 4, 6, 7]}
    # Its own error where it happened, and what the others hear of it there.
    assert first == {**same, "said": 4, "raised": "CoordinationError"}
    assert second == {**same, "said": 0, "raised": "MemoryError"}
    assert Repository(resolve(str(tmp_path))).steps() == [1, 3, 5, 8]
