"""What a load asks of rank 0: few rounds and few bytes, whatever there is to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from benchmarks.scale.load_rounds import BYTES_TARGET, ROUNDS_TARGET, Rounds, counted
from dist_ckpt.testing.ranks import run_ranks

IN_FLIGHT_BYTES = 4 << 20  # a sixth of what there is to read, so there are several windows


class Counter:
    """What may refuse what is stored for it is asked before a tensor changes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def state(tensors: int) -> dict[str, Any]:
    rows = 6000 // tensors
    weights = {f"layers.{n}": torch.full((rows, 1000), float(n)) for n in range(tensors)}
    return {"weights": weights, "counter": Counter(7)}


def empty(tensors: int) -> dict[str, Any]:
    found = state(tensors)
    for each in found["weights"].values():
        each.zero_()
    found["counter"].count = 0
    return found


def load_in_every_way(root: str, tensors: int) -> dict[str, Rounds]:
    """Save once, then load; return the rounds of each load by what it is."""
    found: dict[str, Rounds] = {}
    dist_ckpt.save(state(tensors), root, step=1)
    for exchange in ("always", "never"):
        target = empty(tensors)

        def load(target: dict[str, Any] = target, exchange: Any = exchange) -> None:
            report = dist_ckpt.load(
                target, root, exchange=exchange, in_flight_bytes=IN_FLIGHT_BYTES
            )
            assert report.exchanged is (exchange == "always")

        found[exchange] = counted(load)
        check(target, tensors)
    target = empty(tensors)
    with dist_ckpt.Checkpointer(root, target, every_steps=100) as ckpt:
        # It takes the run over, and finds out if all ranks mean one place.
        found["restore"] = counted(lambda: ckpt.restore(in_flight_bytes=IN_FLIGHT_BYTES))
        check(target, tensors)
    tied = empty(tensors)
    one = tied["weights"]["layers.0"]
    tied["weights"]["layers.1"] = one  # stored as two tensors of other values
    found["ties"] = counted(
        lambda: dist_ckpt.load(tied, root, ties="last", in_flight_bytes=IN_FLIGHT_BYTES)
    )
    assert torch.equal(one, torch.ones_like(one))
    return found


def check(target: dict[str, Any], tensors: int) -> None:
    for name, each in state(tensors)["weights"].items():
        assert torch.equal(target["weights"][name], each), name
    assert target["counter"].count == 7


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_rounds_and_bytes_do_not_grow_with_what_is_read(world: int, tmp_path: Path) -> None:
    few = run_ranks(world, load_in_every_way, str(tmp_path / "few"), 3)
    many = run_ranks(world, load_in_every_way, str(tmp_path / "many"), 600)
    for name in few[0]:
        phases = [[phase for phase, _ in result[name]] for result in (*few, *many)]
        assert all(each == phases[0] for each in phases), (name, phases)
        assert len(phases[0]) <= ROUNDS_TARGET, (name, phases[0])
        for results in (few, many):
            through = sum(nbytes for result in results for _, nbytes in result[name])
            by_phase = dict(results[-1][name])
            assert through <= BYTES_TARGET * world, (name, through, by_phase)
