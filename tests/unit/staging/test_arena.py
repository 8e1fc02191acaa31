"""The arena: aligned, reused, and never pulled away from under those who look at it."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.format.index import Box
from dist_ckpt.staging import Arena
from dist_ckpt.staging.arena import aligned, as_tensor, view_box

PAGE = mmap.PAGESIZE


LARGE = 1 << 20
Resident = Callable[[Arena], int]


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "dist_ckpt-arena"]


def touched() -> None:
    """Wait until nothing is being touched any more."""
    for each in threads():
        each.join()


@pytest.fixture
def resident() -> Resident:
    """Return what tells how much of an arena is in memory."""
    if not hasattr(ctypes.CDLL(None), "mincore"):
        pytest.skip("this system does not tell which pages are there")
    mincore = ctypes.CDLL(None, use_errno=True).mincore

    def count(arena: Arena) -> int:
        arena.reset(arena.capacity_bytes)
        start = address(arena.take(arena.capacity_bytes))
        found = (ctypes.c_ubyte * (arena.capacity_bytes // PAGE))()
        assert mincore(ctypes.c_void_p(start), ctypes.c_size_t(arena.capacity_bytes), found) == 0
        return sum(each & 1 for each in found) * PAGE

    return count


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


@given(st.lists(st.integers(1, 5 * PAGE), max_size=8))
def test_images_are_page_aligned_apart_and_writable(sizes: list[int]) -> None:
    arena = Arena()
    arena.reset(sum(map(aligned, sizes)))
    images = [arena.take(size) for size in sizes]
    for number, image in enumerate(images):
        assert address(image) % PAGE == 0
        image[:] = bytes([number + 1]) * len(image)
    for number, image in enumerate(images):
        assert bytes(image) == bytes([number + 1]) * sizes[number]


@given(st.integers(0, 10 * PAGE))
def test_aligned(nbytes: int) -> None:
    assert aligned(nbytes) % PAGE == 0
    assert max(nbytes, 1) <= aligned(nbytes) < nbytes + PAGE + 1


def test_the_memory_is_reused_and_grows() -> None:
    arena = Arena()
    assert arena.capacity_bytes == 0
    assert not arena.reset(3 * PAGE)
    first = address(arena.take(10))
    assert arena.reset(2 * PAGE), "what was laid out may still be of use"
    assert address(arena.take(10)) == first
    assert arena.capacity_bytes == 3 * PAGE, "a little more is kept"
    assert not arena.reset(9 * PAGE)
    assert arena.capacity_bytes == 9 * PAGE


def test_who_still_looks_at_the_old_memory_keeps_it() -> None:
    arena = Arena()
    arena.reset(PAGE)
    image = arena.take(PAGE)
    tensor = as_tensor(image, torch.int64, (PAGE // 8,), 0)
    tensor.copy_(torch.arange(PAGE // 8))
    arena.reset(100 * PAGE)
    arena.take(100 * PAGE)[:] = b"\xff" * (100 * PAGE)
    del image
    assert torch.equal(tensor, torch.arange(PAGE // 8))


def test_memory_is_touched_before_it_is_used(resident: Resident) -> None:
    arena = Arena()
    arena.prewarm(LARGE)
    touched()
    assert resident(arena) == LARGE
    arena.reset(LARGE)
    assert resident(arena) == LARGE
    assert not threads()


def test_a_save_takes_over_from_the_thread_that_touches() -> None:
    arena = Arena()
    arena.prewarm(64 * LARGE)
    arena.reset(LARGE)
    assert not threads(), "nothing writes zeros into what is staged from now on"
    image = arena.take(LARGE)
    image[:] = b"\x07" * LARGE
    assert arena.reset(LARGE)
    assert bytes(arena.take(LARGE)) == b"\x07" * LARGE


def test_a_guess_that_grows_is_touched_from_where_it_was_left(resident: Resident) -> None:
    arena = Arena()
    arena.prewarm(LARGE)
    arena.prewarm(3 * LARGE)
    touched()
    assert resident(arena) == 3 * LARGE
    arena.prewarm(2 * LARGE)
    assert not threads(), "less than there is needs nothing"


def test_too_large_a_guess_is_given_back_and_the_rest_stays_touched(resident: Resident) -> None:
    arena = Arena()
    arena.prewarm(64 * LARGE)
    touched()
    arena.reset(LARGE)
    assert arena.capacity_bytes == LARGE
    assert resident(arena) == LARGE
    arena.reset(2 * LARGE)
    assert LARGE <= resident(arena) <= 2 * LARGE, "nobody looks at it: it grows where it is"


def test_released_memory_is_gone_and_the_arena_can_be_used_again() -> None:
    arena = Arena()
    arena.prewarm(LARGE)
    arena.release()
    assert arena.capacity_bytes == 0
    assert not threads()
    arena.reset(PAGE)
    arena.take(PAGE)[:] = bytes(PAGE)


class Pinning:
    """Notes what is pinned, and that the memory may be read while it is."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.pinned: list[int] = []
        self.calls = 0

    def __call__(self, memory: memoryview) -> Callable[[], None]:
        self.calls += 1
        if self.error is not None:
            raise self.error
        nbytes = len(memory)
        self.pinned.append(nbytes)
        return lambda: self.pinned.remove(nbytes)


def test_memory_is_pinned_once_it_is_touched_and_unpinned_before_it_changes() -> None:
    pin = Pinning()
    arena = Arena()
    arena.prewarm(LARGE, pin=pin)
    touched()
    assert pin.pinned == [LARGE]
    assert arena.reset(LARGE, pin=pin)
    assert (pin.pinned, pin.calls) == ([LARGE], 1)
    arena.reset(2 * LARGE, pin=pin)
    assert pin.pinned == [2 * LARGE]
    arena.reset(2 * LARGE, pin=pin)
    assert pin.calls == 2
    arena.release()
    assert pin.pinned == []


@pytest.mark.parametrize("warm", [True, False])
def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    *, warm: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pin = Pinning(RuntimeError("over the limit"))
    arena = Arena()
    if warm:
        arena.prewarm(LARGE, pin=pin)
        touched()
    arena.reset(LARGE, pin=pin)
    arena.reset(LARGE, pin=pin)
    arena.take(LARGE)[:] = bytes(LARGE)
    assert pin.calls == 1, "asked once, and not at each save"
    (record,) = caplog.records
    assert "could not be pinned" in record.message
    assert "over the limit" in record.message


def test_more_than_was_reserved_is_refused() -> None:
    arena = Arena()
    with pytest.raises(ValueError, match="no room"):
        arena.take(1)
    arena.reset(PAGE)
    arena.take(PAGE)
    with pytest.raises(ValueError, match="no room"):
        arena.take(1)


def test_a_tensor_lies_where_it_was_asked_for() -> None:
    arena = Arena()
    arena.reset(PAGE)
    image = arena.take(64)
    as_tensor(image, torch.int16, (2, 3), 8).copy_(torch.arange(6).reshape(2, 3))
    assert bytes(image) == bytes(8) + bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0]) + bytes(44)


@given(st.data())
def test_a_box_is_found_in_a_tensor_that_starts_elsewhere(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=3))
    origin = tuple(data.draw(st.integers(0, 5)) for _ in sizes)
    source = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, sizes, strict=True)]
    box = Box(
        tuple(a + o for a, o in zip(starts, origin, strict=True)),
        tuple(b - a for a, b in zip(starts, stops, strict=True)),
    )
    target = view_box(source, box, origin=origin)
    wanted = source[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
    assert torch.equal(target, wanted)
