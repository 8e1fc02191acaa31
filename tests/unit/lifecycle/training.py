"""A run of a few numbers, and what was said of it."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.repository import Repository
from dist_ckpt.storage.memory import MemoryStore

LOSS = "val/loss"
_names = itertools.count()


def new_store() -> MemoryStore:
    """Return a place in memory that no other test has seen."""
    return MemoryStore(f"unit-lifecycle-{next(_names)}")


def state(value: int = 0) -> dict[str, Any]:
    """Return a state that tells which step it is of."""
    return {"weights": {"w": torch.full((4,), float(value))}}


def run_of(store: Any, *steps: int, **metrics: float) -> None:
    """Add checkpoints to a run, each of them by another job."""
    for step in steps:
        dist_ckpt.save(state(step), store, step=step, metrics=metrics)


def steps(store: Any) -> list[int]:
    """Return what is listed."""
    return Repository(store).steps()


def keys(store: Any) -> list[str]:
    """Return all that is stored."""
    return sorted(entry.key for entry in store.list_entries())


def claims(store: Any) -> list[str]:
    """Return the claims on the run."""
    found: list[str] = store.list_children("claims/")
    return found


def manifest_of(store: Any, step: int) -> Any:
    """Return what was committed."""
    return Repository(store).open(step).manifest


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings so far, but of a thread that a job of an earlier test may have left."""
    found = (each for each in caplog.records if each.levelno == logging.WARNING)
    return [each.getMessage() for each in found if each.threadName != "dist_ckpt-status"]
