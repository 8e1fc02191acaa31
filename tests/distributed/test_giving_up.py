"""One rank cancels, or is busy: all ranks end, skip or replace the save alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CheckpointError
from dist_ckpt.options import WhenBusy
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.unit.saving.slow_store import EndlessPut

WORLD = 3
# Nobody waits for it: a cancel that did not arrive would end the test by its own limit.
TIMEOUT_SECONDS = 3600.0


def state() -> dict[str, Any]:
    return {"weights": {"w": torch.arange(300_000.0)}}


def cancel_on_one_rank(root: str, cancelling: int) -> dict[str, Any]:
    """Every rank is in the middle of its put when one of them cancels."""
    store = EndlessPut(LocalStore(root), "step-0000000001/*/weights.*")
    error = None
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=TIMEOUT_SECONDS) as ckpt:
        handle = ckpt.save(1)
        store.reached.wait()
        dist.barrier()
        if dist.get_rank() == cancelling:
            assert handle.cancel()
        try:
            handle.wait()
        except CheckpointError as caught:
            error = caught
        dist.barrier()
        listed = Repository(LocalStore(root)).steps()
        dist.barrier()
        ckpt.save(2).wait()
    assert error is not None
    return {
        "outcome": handle.outcome,
        "ranks": sorted(error.ranks),
        "message": str(error),
        "listed": listed,
    }


def test_one_rank_cancels_and_no_rank_writes_on(tmp_path: Path) -> None:
    for cancelling in (0, 2):
        root = tmp_path / str(cancelling)
        for found in run_ranks(WORLD, cancel_on_one_rank, str(root), cancelling):
            assert found == {
                "outcome": "cancelled",
                "ranks": [cancelling],
                "message": f"save of step 1 was cancelled on rank {cancelling}",
                "listed": [],
            }
        assert Repository(LocalStore(root)).verify(2).ok
        # Each rank took back what it had written, and the next save collected the rest.
        assert [path for path in root.rglob("step-0000000001/*") if path.is_file()] == []


def save_beside_a_slow_rank(root: str, when_busy: WhenBusy) -> dict[str, Any]:
    """Only one rank is still writing when the next save is asked for."""
    rank = dist.get_rank()
    key = "step-0000000001/*" if rank == 1 else "none"
    store = EndlessPut(LocalStore(root), key)
    with dist_ckpt.Checkpointer(
        store, state(), when_busy=when_busy, timeout_seconds=TIMEOUT_SECONDS
    ) as ckpt:
        first = ckpt.save(1)
        if rank == 1:
            store.reached.wait()
        dist.barrier()  # else the put might be cancelled before it began
        second = ckpt.save(2)
        outcome = second.outcome
        dist.barrier()
        store.let_go.set()
        second.wait()
        if when_busy == "skip":
            first.wait()
        ckpt.save(3).wait()
    return {"first": first.outcome, "second": outcome or second.outcome}


def test_ranks_skip_together(tmp_path: Path) -> None:
    for found in run_ranks(WORLD, save_beside_a_slow_rank, str(tmp_path), "skip"):
        assert found == {"first": "committed", "second": "skipped"}
    assert Repository(LocalStore(tmp_path)).steps() == [1, 3]


def test_ranks_replace_together(tmp_path: Path) -> None:
    for found in run_ranks(WORLD, save_beside_a_slow_rank, str(tmp_path), "replace"):
        assert found == {"first": "cancelled", "second": "committed"}
    assert Repository(LocalStore(tmp_path)).steps() == [2, 3]


def ask_for_different_things(root: str) -> str:
    when_busy: WhenBusy = "skip" if dist.get_rank() == 2 else "wait"
    with dist_ckpt.Checkpointer(root, state(), when_busy=when_busy) as ckpt:
        try:
            ckpt.save(1)
        except CheckpointError as error:
            return str(error)
    raise AssertionError("ranks that would act differently must be told so")


def test_ranks_that_would_act_differently_are_told(tmp_path: Path) -> None:
    for message in run_ranks(WORLD, ask_for_different_things, str(tmp_path)):
        assert "when_busy" in message
        assert "rank 2" in message
