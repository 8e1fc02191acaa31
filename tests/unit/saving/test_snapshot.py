"""What one rank holds at the moment of a save."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.planning.describe import Describer
from dist_ckpt.saving.snapshot import take_snapshot
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore


def state(**parts: Any) -> TrainState:
    return TrainState(rng=None, **parts)


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(UsageError, match="the state is empty"):
        take_snapshot(state(), world_size=1)


def test_a_state_cannot_be_taken_inside_the_capture_of_a_cuda_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with dist_ckpt.Checkpointer(MemoryStore("unit-snapshot"), state(n={"v": 1})) as ckpt:
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_available", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(UsageError, match="outside of the capture"):
                ckpt.save(1)
        ckpt.save(1).wait()


def test_the_fingerprint_is_that_of_the_structure_alone() -> None:
    weights = {"w": torch.ones(3)}
    describer = Describer()

    def fingerprint(world_size: int = 2, **parts: Any) -> str:
        taken = take_snapshot(
            state(weights=weights, **parts), world_size=world_size, describer=describer
        )
        return taken.fingerprint

    first = fingerprint()
    weights["w"] = torch.zeros(3)
    assert fingerprint() == first
    assert fingerprint(world_size=3) != first
    assert fingerprint(more={"n": 1}) != first
    weights["w"] = torch.zeros(4)
    assert fingerprint() != first
    # What a describer remembers changes nothing about what is said.
    assert take_snapshot(state(weights=weights), world_size=2).fingerprint == fingerprint()


@pytest.mark.parametrize(
    "value",
    [(n for n in range(3)), lambda: 1, sys.__stdout__, torch.ones(2, device="meta")],
    ids=["generator", "lambda", "file", "meta tensor"],
)
def test_what_has_no_value_to_store_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match=r"stats\.x"):
        take_snapshot(state(stats={"x": value}), world_size=1)
