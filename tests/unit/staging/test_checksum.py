"""Checksums tell changes, wherever they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.staging import checksum as module
from dist_ckpt.staging.checksum import checksum


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


def test_the_order_counts_over_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORDS_AT_ONCE", 7)
    tensor = torch.arange(21, dtype=torch.int32)
    first, second, third = tensor[:7], tensor[7:14], tensor[14:]
    sums = [
        int(checksum(torch.cat(parts)))
        for parts in ([first, second, third], [second, first, third], [third, second, first])
    ]
    assert len(set(sums)) == 3
    assert int(checksum(tensor.view(torch.uint8)[:-1])) not in sums


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_is_told_from_another_one(value: float) -> None:
    assert int(checksum(torch.full((64,), value))) != int(checksum(torch.full((64,), 2.0)))
