"""What the crash tests save, and how they look at what a crash left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.format.names import manifest_key
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore

# The oldest is deleted when the step of the crash is committed: a job goes on from the next one.
OLD_STEP, BASE_STEP, CRASH_STEP, NEXT_STEP = 0, 1, 2, 3


def state(step: int) -> dict[str, Any]:
    """Return a state that bears its step in a tensor and in a plain value."""
    weights = torch.full((3, 50_000), float(step))
    return {"model": {"weights": weights, "bias": torch.arange(step)}, "progress": {"step": step}}


def save(place: str | Store, step: int) -> None:
    """Go on from what is there and save `step`, keeping only the newest."""
    with dist_ckpt.Checkpointer(
        place, state(step), keep=keep.latest(1), timeout_seconds=600
    ) as ckpt:
        go_on(ckpt)
        ckpt.save(step).wait()


def go_on(ckpt: dist_ckpt.Checkpointer) -> int:
    """Go on from what is there, with other weights than those; return its step."""
    return ckpt.restore(only=["rng"])


def check_run(root: Path) -> list[int]:
    """Check that every listed checkpoint is whole and exact; return the steps."""
    repository = Repository(LocalStore(root))
    steps = repository.steps()
    for step in steps:
        assert repository.verify(step).ok, f"step {step} is listed and damaged"
        found = dist_ckpt.TrainState.of(state(0))
        dist_ckpt.load(found, root, step=step)
        expected = state(step)
        assert found["progress"] == expected["progress"]
        for name, tensor in found["model"].items():
            assert torch.equal(tensor, expected["model"][name]), f"{name} of step {step}"
    return steps


def check_after_crash(root: Path) -> None:
    """Check the promise: an old or the new checkpoint is found, and the next save works."""
    steps = check_run(root)
    assert steps[-1] in (BASE_STEP, CRASH_STEP)
    assert BASE_STEP in steps, "the one that was gone on from is never deleted"
    save(str(root), NEXT_STEP)
    # What it went on from stays; retention must have removed the older ones.
    origin = steps[-1]
    assert check_run(root) == [origin, NEXT_STEP]
    whole = Repository(LocalStore(root)).open(origin).manifest
    leftovers = [
        path
        for path in root.rglob("*")
        if path.is_file()
        and path.parent.name != "claims"
        and f"{NEXT_STEP:010}" not in str(path)
        and whole.save_id not in str(path)
        and path != root / manifest_key(origin)
    ]
    assert leftovers == [], "what the crash left must be collected by the next save"
