"""One rank fails: every rank hears of it in time, nothing is listed, and the next save works."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CheckpointError, ErrorKind
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, Fault, FaultyStore, Hang, Rule

SHARD = "*.safetensors"
WORLD = 3


class Unpicklable(Exception):
    """Holds what no pickle can carry, and cannot even say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.hook = lambda: None

    def __reduce__(self) -> Any:
        raise TypeError("never to be pickled")

    def __str__(self) -> str:
        raise RuntimeError("no text")


def fault(name: str) -> tuple[Fault, Hang | None]:
    if name == "full disk":
        return Fail(OSError(errno.ENOSPC, "No space left on device")), None
    if name == "unpicklable":
        return Fail(Unpicklable()), None
    hang = Hang()
    return hang, hang


def save_with_fault(root: str, name: str, failing: int, timeout_seconds: float) -> dict[str, Any]:
    rank = dist.get_rank()
    store: Store = LocalStore(root)
    injected, hang = fault(name)
    if rank == failing:
        # Both puts of the failing rank's first save fail, none of the next.
        store = FaultyStore(
            store, [Rule("put", injected, key=f"step-0000000002/{SHARD}", nth=None)]
        )
    state = {"weights": {"w": torch.arange(100_000.0)}, "step": {"n": torch.tensor(2)}}
    ckpt = dist_ckpt.Checkpointer(store, state, timeout_seconds=timeout_seconds)
    with ckpt:
        ckpt.save(1).wait()
        handle = ckpt.save(2)
        error: CheckpointError | None = None
        try:
            handle.wait()
        except CheckpointError as caught:
            error = caught
        listed = Repository(LocalStore(root)).steps()
        dist.barrier()  # nobody saves again before everybody has looked
        ckpt.save(3).wait()
    if hang is not None:
        hang.release()
    assert error is not None, "the save must fail on every rank"
    return {
        "ranks": sorted(error.ranks),
        "message": str(error),
        "kind": error.kind,
        "listed": listed,
    }


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("name", "says"),
    [("full disk", "No space left"), ("unpicklable", "Unpicklable"), ("hang", "")],
)
def test_every_rank_hears_of_it(name: str, says: str, failing: int, tmp_path: Path) -> None:
    timeout = 3.0 if name == "hang" else 60.0
    results = run_ranks(WORLD, save_with_fault, str(tmp_path), name, failing, timeout)
    for result in results:
        assert result["listed"] == [1]
        assert result["ranks"] == [failing]
        assert says in result["message"]
    assert Repository(LocalStore(tmp_path)).steps() == [1, 3]
    assert Repository(LocalStore(tmp_path)).verify(3).ok


def absent(root: str) -> str:
    ckpt = dist_ckpt.Checkpointer(root, {"n": {"v": 1}}, timeout_seconds=10.0)
    message = ""
    with ckpt:
        ckpt.save(1).wait()
        if dist.get_rank() != 1:
            with pytest.raises(CheckpointError) as caught:
                ckpt.save(2)
            assert caught.value.kind in (ErrorKind.PEER_ABSENT, ErrorKind.TIMEOUT)
            message = f"{sorted(caught.value.ranks)}"
        dist.barrier()
    return message


def test_a_rank_that_does_not_save_is_named(tmp_path: Path) -> None:
    assert run_ranks(WORLD, absent, str(tmp_path)) == ["[1]", "", "[1]"]
    assert Repository(LocalStore(tmp_path)).steps() == [1]


def unequal(root: str, what: str) -> tuple[str, str]:
    rank = dist.get_rank()
    state: dict[str, Any] = {"weights": {"w": torch.ones(4)}, "stats": {"loss": 0.5}}
    step = 1
    if what == "step":
        step = 1 + rank
    elif what == "value":
        state["stats"] = {"loss": 0.5 + rank}
    elif what == "shape":
        state["weights"] = {"w": torch.ones(4 + rank)}
    elif what == "lambda" and rank == 1:
        state["stats"] = {"loss": lambda: 0.5}
    elif what == "bad step":
        step = -1
    with dist_ckpt.Checkpointer(root, state, timeout_seconds=600) as ckpt:
        with pytest.raises(CheckpointError) as caught:
            ckpt.save(step).wait()
        return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("step", "UsageError", "rank 1: 2"),
        ("value", "IncompatibleError", "'stats' differs between rank 0 and rank 1"),
        ("shape", "IncompatibleError", "float32[5] on rank 1"),
        ("lambda", "UsageError", "rank 1: cannot store stats.loss"),
        ("bad step", "UsageError", "bad step -1"),
    ],
)
def test_ranks_that_disagree_are_told(what: str, kind: str, says: str, tmp_path: Path) -> None:
    results = run_ranks(2, unequal, str(tmp_path), what)
    assert results[0] == results[1]
    name, message = results[0]
    assert name == kind
    assert says in message
    assert Repository(LocalStore(tmp_path)).steps() == []
