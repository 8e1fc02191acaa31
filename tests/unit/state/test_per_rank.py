"""Values of each rank at another world size: resharded by a hook, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.part import Part, Stored
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState
from tests.unit.state.roundtrip import save


def spread(saved: Sequence[Any], rank: int, world_size: int) -> Any:
    everything = sorted(item for each in saved for item in each["left"])
    return {"left": everything[rank::world_size]}


class Queue:
    """A loader that knows by itself how to be shared out anew."""

    def __init__(self, left: list[int]) -> None:
        self.left = left

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.left = state["left"]

    def reshard(self, saved: Sequence[Any], rank: int, world_size: int) -> Any:
        return spread(saved, rank, world_size)


def part_of(value: PerRank) -> Part:
    return TrainState(rng=None, queue=value).parts["queue"]


def stored_by_two(rank: int, world_size: int) -> Stored:
    by_rank = [save(part_of(PerRank({"left": left}))) for left in ([0, 2, 4], [1, 3])]
    stored = by_rank[0].stored(rank=rank, world_size=world_size, saved=2)
    return replace(stored, by_rank=lambda: [saved.objects for saved in by_rank])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_hook_makes_the_values_of_the_new_ranks(world_size: int) -> None:
    by_function, by_method = PerRank({"left": [9]}, reshard=spread), PerRank(Queue([9]))
    for value in (by_function, by_method):
        seen: list[int] = []
        for rank in range(world_size):
            part = part_of(value)
            stored = stored_by_two(rank, world_size)
            targets = part.targets(stored)
            assert (targets.missing, targets.unexpected) == ([], [])
            assert targets.note == (
                f"queue was kept per rank by 2 ranks and resharded for {world_size}"
            )
            part.restore(stored, {})
            live = value.value
            seen += live.left if isinstance(live, Queue) else live["left"]  # type: ignore[index]
        assert sorted(seen) == [0, 1, 2, 3, 4]


def test_at_the_same_world_size_each_rank_gets_its_own_and_no_hook_runs() -> None:
    def never(saved: Sequence[Any], rank: int, world_size: int) -> Any:
        raise AssertionError

    value = {"left": [9]}
    part = part_of(PerRank(value, reshard=never))
    stored = stored_by_two(0, 2)
    assert part.targets(stored).note is None
    part.restore(stored, {})
    assert value == {"left": [0, 2, 4]}


def test_without_a_hook_nothing_is_dropped_silently() -> None:
    value = {"left": [9]}
    with pytest.raises(IncompatibleError, match="queue is kept per rank: it was saved by 2 ranks"):
        part_of(PerRank(value)).targets(stored_by_two(0, 3))
    assert value == {"left": [9]}


def test_a_hook_that_fails_is_named() -> None:
    def broken(saved: Sequence[Any], rank: int, world_size: int) -> Any:
        raise KeyError("cursor")

    part = part_of(PerRank({"left": [9]}, reshard=broken))
    with pytest.raises(IncompatibleError, match="queue: its reshard hook failed on rank 1 of 3"):
        part.restore(stored_by_two(1, 3), {})
