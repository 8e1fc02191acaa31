"""Bounce buffers: memory that was made ready, cut up, and used again."""

from __future__ import annotations

import pytest

from dist_ckpt.staging.bounce import BounceBuffers, BounceMemory

_PAGE_BYTES = 4096


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


def test_each_borrower_has_a_buffer_of_its_own() -> None:
    with BounceMemory(64) as memory:
        buffers = BounceBuffers(2, 10, devices=[], memory=memory)
        with buffers.lend() as one, buffers.lend() as other:
            one[:] = b"1" * 10
            other[:] = b"2" * 10
            assert bytes(one) == b"1" * 10
        with buffers.lend() as again:
            assert len(again) == 10
