"""Bounce buffers: memory that was made ready, cut up, and used again."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ckpt.loading import fetching
from dist_ckpt.loading.fetching import BounceBuffers, BounceMemory

_PAGE_BYTES = 4096


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "kept_memory", [])


@pytest.mark.parametrize("guess", [0, 1, 3 * _PAGE_BYTES, 1 << 20], ids=str)
def test_buffers_are_apart_and_on_pages_whatever_was_guessed(guess: int) -> None:
    with BounceMemory(guess) as memory:
        buffers = memory.cut(3, _PAGE_BYTES + 5)
        for number, buffer in enumerate(buffers):
            buffer[:] = bytes([number + 1]) * len(buffer)
        assert [bytes(buffer) for buffer in buffers] == [
            bytes([number + 1]) * (_PAGE_BYTES + 5) for number in range(3)
        ]


def test_memory_may_be_cut_again_and_after_it_was_released() -> None:
    memory = BounceMemory(1 << 20)
    assert [len(buffer) for buffer in memory.cut(2, 100)] == [100, 100]
    assert [len(buffer) for buffer in memory.cut(4, 300_000)] == [300_000] * 4
    memory.release()
    assert [len(buffer) for buffer in memory.cut(1, 7)] == [7]
    memory.release()


def address_of(memory: BounceMemory) -> int:
    (buffer,) = memory.cut(1, 1 << 20)
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def test_memory_of_a_load_that_went_well_is_used_by_the_next_one() -> None:
    with BounceMemory(1 << 20) as memory:
        first = address_of(memory)
    # In pairs, since new memory may lie where some was just given back.
    with BounceMemory(1 << 20) as memory, BounceMemory(1 << 20) as beside:
        assert address_of(memory) == first
        assert address_of(beside) != first
    with pytest.raises(KeyError), BounceMemory(1 << 20):
        raise KeyError
    assert not fetching.kept_memory


def test_much_memory_is_given_back() -> None:
    with BounceMemory(fetching.KEPT_BYTES + 1):
        pass
    assert not fetching.kept_memory
    with BounceMemory() as memory:
        memory.cut(1, 100)
        memory.release()
    assert not fetching.kept_memory


def test_each_borrower_has_a_buffer_of_its_own() -> None:
    with BounceMemory(64) as memory:
        buffers = BounceBuffers(2, 10, devices=[], memory=memory)
        one, other = buffers.take(), buffers.take()
        with buffers.using(one), buffers.using(other):
            one.memory[:] = b"1" * 10
            other.memory[:] = b"2" * 10
            assert bytes(one.memory) == b"1" * 10
        assert {len(buffers.take().memory), len(buffers.take().memory)} == {10}
