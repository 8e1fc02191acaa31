"""The arena: aligned, reused, and never pulled away from under those who look at it."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.format.boxes import Box
from dist_ckpt.staging import Arena, copy_box
from dist_ckpt.staging.arena import aligned, as_tensor

PAGE = mmap.PAGESIZE


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
    arena.reset(3 * PAGE)
    first = address(arena.take(10))
    arena.reset(2 * PAGE)
    assert address(arena.take(10)) == first
    assert arena.capacity_bytes == 3 * PAGE, "it never shrinks"
    arena.reset(9 * PAGE)
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
def test_boxes_are_copied_out_of_tensors_that_start_elsewhere(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=3))
    origin = tuple(data.draw(st.integers(0, 5)) for _ in sizes)
    source = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, sizes, strict=True)]
    box = Box(
        tuple(a + o for a, o in zip(starts, origin, strict=True)),
        tuple(b - a for a, b in zip(starts, stops, strict=True)),
    )
    target = torch.zeros(box.sizes, dtype=torch.int64)
    copy_box(target, source.requires_grad_(False), box, origin=origin)
    wanted = source[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
    assert torch.equal(target, wanted)


def test_a_parameter_is_copied_without_a_graph_and_a_conjugate_as_its_value() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    target = torch.zeros(3)
    copy_box(target, parameter, Box((0,), (3,)), origin=(0,))
    assert not target.requires_grad
    value = torch.tensor([1 + 2j, 3 - 4j])
    conjugate = torch.zeros(2, dtype=torch.complex64)
    copy_box(conjugate, value.conj(), Box((0,), (2,)), origin=(0,))
    assert conjugate.tolist() == [1 - 2j, 3 + 4j]
