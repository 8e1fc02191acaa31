"""Replicas that differ are found and named, wherever they lie and whatever they hold."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.planning.describe import Describer, LocalBox
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.ranks.rounds import pack
from dist_ckpt.saving.agreement import (
    SAMPLES,
    compare_replicas,
    digest_replicas,
    digest_sample,
    samples_differ,
)
from dist_ckpt.saving.messages import ReplicaDigests

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]


def compared(by_rank: list[dict[str, torch.Tensor]], **marks: Any) -> bytes:
    """Compare what ranks hold, as a save does."""
    local = [Describer().describe({"m": named}, **marks) for named in by_rank]
    held = [[box.held for box in boxes] for boxes in local]
    replicas = [
        [position for group in groups.values() for position in group]
        for groups in Holdings.of(held).replicas()
    ]
    digests = [
        pack(digest_replicas([boxes[number] for number in numbers]))
        for boxes, numbers in zip(local, replicas, strict=True)
    ]
    return compare_replicas(held, replicas, digests)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_difference_is_named(dtype: torch.dtype) -> None:
    def rank(bit: int) -> dict[str, torch.Tensor]:
        raw = torch.zeros(2, 24, dtype=torch.uint8)
        raw[1, -1] = bit
        return {"same": torch.ones(3), "w": raw.view(dtype)}

    assert compared([rank(1), rank(1), rank(1)]) == b""
    with pytest.raises(IncompatibleError, match=r"'w' of part 'm' .* rank 0 than .* rank 2") as e:
        compared([rank(1), rank(1), rank(0)])
    assert e.value.kind == ErrorKind.REPLICAS_DIFFER
    assert sorted(e.value.ranks) == [0, 2]


def test_bits_are_compared_and_not_numbers() -> None:
    nan = {"w": torch.tensor([float("nan")])}
    assert compared([nan, nan]) == b""
    with pytest.raises(IncompatibleError):
        compared([{"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}])


def test_layout_in_memory_does_not_count() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    turned = whole.t().contiguous().t()
    assert compared([{"w": whole}, {"w": turned}]) == b""
    assert compared([{"w": torch.ones(4, 3)}, {"w": torch.ones(1).expand(4, 3)}]) == b""


def test_values_that_may_differ_are_exempt() -> None:
    ranks = [{"mean": torch.ones(2)}, {"mean": torch.zeros(2)}]
    assert compared(ranks, unequal={"m": {"mean"}}) == b""


def test_what_one_rank_alone_holds_is_not_digested() -> None:
    held = [
        [box.held for box in Describer().describe({"m": {f"stage{rank}": torch.ones(2)}})]
        for rank in range(2)
    ]
    assert Holdings.of(held).replicas() == [{}, {}]


def test_digests_of_two_kinds_are_not_compared_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = [[box.held for box in Describer().describe({"m": {"w": torch.ones(2)}})]] * 2
    messages = [pack(ReplicaDigests(method, b"8 bytes " * 1)) for method in (b"h", b"d")]
    with caplog.at_level(logging.WARNING, logger="dist_ckpt"):
        assert compare_replicas(held, [[0], [0]], messages) == b""
    assert "m/w, ranks 0 and 1" in caplog.text
    assert "not compared" in caplog.text


def test_nothing_to_digest() -> None:
    assert digest_replicas(list[LocalBox]()) == ReplicaDigests(b"", b"")


def sample(turn: int, **named: torch.Tensor) -> bytes:
    return digest_sample(Describer().describe({"m": named}), turn)


@pytest.mark.parametrize("place", [0, 1, 500, 999, 1000, 1003])
def test_one_round_of_samples_finds_any_change(place: int) -> None:
    def state(change: float) -> dict[str, torch.Tensor]:
        memory = torch.arange(1004.0)
        memory[place] += change
        return {"a": memory[:1000].view(20, 50).t(), "empty": torch.ones(0), "b": memory[1000:]}

    found = [sample(turn, **state(0)) != sample(turn, **state(1)) for turn in range(SAMPLES)]
    assert found.count(True) == 1
    assert sample(SAMPLES, **state(0)) == sample(0, **state(0)), "they come round"


def test_a_change_of_everything_shows_in_every_sample() -> None:
    one, other = ({"w": torch.full((4096,), value)} for value in (1.0, 2.0))
    assert all(sample(turn, **one) != sample(turn, **other) for turn in range(SAMPLES))


def test_samples_of_two_kinds_are_not_compared() -> None:
    host, device = b"h" + b"8 bytes ", b"d" + b"8 bytez "
    assert not samples_differ([{0: host}, {0: device}, {0: host, 1: device}])
    assert samples_differ([{0: host}, {0: device}, {0: b"h" + b"8 bytez "}])


def test_groups_have_one_number_and_one_order_on_all_their_ranks() -> None:
    boxes = {"all": torch.ones(2), "also": torch.ones(3)}
    extra = {"pair": torch.ones(4)}
    held = [
        [box.held for box in Describer().describe({"m": named})]
        for named in ({**extra, **boxes}, boxes, {**boxes, **extra})
    ]
    replicas = Holdings.of(held).replicas()
    named = [
        {group: [held[rank][at].name for at in positions] for group, positions in groups.items()}
        for rank, groups in enumerate(replicas)
    ]
    assert named[0] == named[2]
    assert sorted(named[0].values()) == [["all", "also"], ["pair"]]
    (only,) = named[1]
    assert named[1][only] == named[0][only] == ["all", "also"]
