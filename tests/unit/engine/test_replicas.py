"""Replicas that differ are found and named, wherever they lie and whatever they hold."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.dcp.holdings import Holdings
from dist_ckpt.dcp.planner import Describer, LocalBox
from dist_ckpt.engine.messages import ReplicaDigests, pack
from dist_ckpt.engine.replicas import checksum, compare_replicas, digest_replicas
from dist_ckpt.errors import ErrorKind, IncompatibleError

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]


def compared(by_rank: list[dict[str, torch.Tensor]], **marks: Any) -> bytes:
    """Compare what ranks hold, as a save does."""
    local = [Describer().describe({"m": named}, **marks) for named in by_rank]
    held = [[box.held for box in boxes] for boxes in local]
    replicas = Holdings.of(held).replicas()
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
    assert Holdings.of(held).replicas() == [[], []]


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


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_checksum_tells_any_changed_byte(content: bytes, data: st.DataObject) -> None:
    def summed(raw: bytes) -> int:
        return int(checksum(torch.frombuffer(bytearray(raw), dtype=torch.uint8)))

    place = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    changed = content[:place] + bytes([other]) + content[place + 1 :]
    assert summed(content) == summed(bytes(content))
    assert summed(content) != summed(changed)
    if content != content[::-1]:
        assert summed(content) != summed(content[::-1]), "the order counts"


def test_a_checksum_does_not_depend_on_how_much_is_widened_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.randn(1000)
    whole = int(checksum(tensor))
    monkeypatch.setattr("dist_ckpt.engine.replicas._WORDS_AT_ONCE", 7)
    assert int(checksum(tensor)) == whole
    assert int(checksum(tensor.view(torch.uint8)[:-1])) != whole
