"""Filling against brute force: any stored cut, any wanted box, any cut of the reads, every bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt.format.files import FileEntry
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.loading import filling
from dist_ckpt.loading.fetching import cut
from dist_ckpt.loading.filling import Files, ReadTarget, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.repository import Checkpoint
from tests.unit.planning.boxes import grids, held
from tests.unit.planning.saved import checkpoint, content, local, same_bits
from tests.unit.planning.saved import cut as part_of

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex128)


def wants(index: Index, targets: Sequence[LocalBox]) -> list[Wanted]:
    numbers = {entry.name: number for number, entry in enumerate(index.tensors)}
    dtypes = {number: entry.dtype for number, entry in enumerate(index.tensors)}
    return [
        Wanted(numbers[t.held.name], t, getattr(torch, dtypes[numbers[t.held.name]]))
        for t in targets
    ]


def read(
    opened: Checkpoint,
    targets: Sequence[LocalBox],
    *,
    unit: int = 1,
    most: int = 1 << 20,
    landing: bool = False,
) -> int:
    """Fill `targets` with reads of whole units that are cut at `most`; return the bytes read.

    Args:
        opened: where from.
        targets: what to fill.
        unit: bytes.
        most: bytes of one read.
        landing: whether what can be is read straight to its place.
    """
    files = Files([file.nbytes for file in opened.index.files], unit_bytes=unit)
    planned = ReadTargets(opened.index, wants(opened.index, targets), files, max_gap_bytes=unit)
    pieces = cut(planned.needs, most_bytes=most)
    # Backwards, since the order does not matter.
    for start, stop in reversed(pieces.pairs()):
        data = memoryview(bytearray(stop - start))
        file, offset = files.place(start)
        if landing:
            landings = planned.land(start, data)
            opened.read_into(file, offset, *(each.view for each in landings))
            for each in landings:
                planned.settle(each)
        else:
            opened.read_into(file, offset, data)
            planned.fill(start, data)
    return pieces.nbytes


def blank(name: str, tensor: torch.Tensor, box: Box) -> LocalBox:
    """Return memory for `box` that holds something else than the tensor does."""
    target = local(name, tensor, box)
    raw = target.memory.reshape(-1).view(torch.uint8)
    raw.copy_(1 - raw if tensor.dtype is torch.bool else ~raw)
    return target


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    stops = [draw(st.integers(a, n)) for a, n in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(b - a for a, b in zip(starts, stops, strict=True)))


@settings(max_examples=60)
@given(st.data())
def test_any_cut_into_any_other(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 4))
    by_rank: list[list[LocalBox]] = [[] for _ in range(world_size)]
    tensors: dict[str, torch.Tensor] = {}
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 7), max_size=3))
        name = f"t{number}"
        tensors[name] = content(shape, data.draw(st.sampled_from(DTYPES)), seed=number)
        for box in data.draw(grids(shape)):
            for rank in data.draw(st.sets(st.integers(0, world_size - 1), min_size=1)):
                by_rank[rank].append(local(name, tensors[name], box))
    opened = checkpoint(by_rank)
    wanted = [
        blank(name, tensor, data.draw(boxes_in(tensor.shape)))
        for name, tensor in tensors.items()
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    unit = data.draw(st.sampled_from([1, 3, 16]))
    most = unit * data.draw(st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "STRAIGHT_BYTES", data.draw(st.integers(1, 9)))
        read(opened, wanted, unit=unit, most=most, landing=data.draw(st.booleans()))
    for target in wanted:
        expected = part_of(tensors[target.held.name], target.held.box)
        assert same_bits(target.memory, expected), target.held


@settings(max_examples=60)
@given(st.data())
def test_needs_are_the_bytes_of_wanted_elements_and_small_gaps(data: st.DataObject) -> None:
    """The map of every element of the tensor to its byte is what the ranges are compared with."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    chunks = data.draw(grids(list(shape)))
    index, place = stored_at(shape, chunks)
    gap = data.draw(st.integers(0, 6))
    boxes = data.draw(st.lists(boxes_in(shape), min_size=1, max_size=4))
    files = Files([file.nbytes for file in index.files], unit_bytes=1)
    memory = [LocalBox(held("t", shape, box), torch.empty(box.sizes)) for box in boxes]
    filling = ReadTargets(index, wants(index, memory), files, max_gap_bytes=gap)
    found = {at for start, stop in filling.needs.pairs() for at in range(start, stop)}
    exact = {
        place[element] + byte
        for box in boxes
        for element in itertools.product(
            *(range(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        )
        for byte in range(4)
    }
    assert exact <= found
    vain = sorted(found - exact)
    runs = [at for at in vain if at - 1 not in found - exact]
    for first in runs:
        length = next(n for n in itertools.count() if first + n not in found - exact)
        assert length <= gap


def stored_at(
    shape: tuple[int, ...], chunks: Sequence[Box]
) -> tuple[Index, dict[tuple[int, ...], int]]:
    """Return the index of one tensor, its chunks one after another, and each element's byte."""
    place: dict[tuple[int, ...], int] = {}
    rows, at = [], 0
    for box in chunks:
        rows.append((0, 0, at, box))
        pairs = zip(box.offsets, box.sizes, strict=True)
        for element in itertools.product(*(range(a, a + n) for a, n in pairs)):
            place[element] = at
            at += 4
    files = [FileEntry("model.r00000.safetensors", at, "", b"")]
    return Index.build(files, [TensorEntry("model", "t", "float32", shape)], [], rows), place


@pytest.mark.parametrize("odd", [0, 1, 3])
@pytest.mark.parametrize("target", [torch.float32, torch.float64])
def test_elements_that_lie_anywhere_are_put_together_and_cast(
    odd: int, target: torch.dtype
) -> None:
    whole = content((9, 11), torch.int32).to(torch.float32)
    raw = bytes(odd) + whole.numpy().tobytes()
    entry = FileEntry("model.r00000.safetensors", len(raw), "", b"")
    box = Box((0, 0), (9, 11))
    tensors = [TensorEntry("model", "t", "float32", (9, 11))]
    index = Index.build([entry], tensors, [], [(0, 0, odd, box)])
    files = Files([len(raw)], unit_bytes=16)
    inner = Box((2, 3), (6, 5))
    memory = torch.zeros(6, 5, dtype=target)
    wanted = Wanted(0, LocalBox(held("t", (9, 11), inner), memory), torch.float32)
    filling = ReadTargets(index, [wanted], files, max_gap_bytes=16)
    for start, stop in cut(filling.needs, most_bytes=32).pairs():
        filling.fill(start, memoryview(bytearray(raw[start:stop])))
    assert torch.equal(memory, part_of(whole, inner).to(target))
    assert filling.names_in(0, 64) == []
    assert filling.names_in(*filling.needs.pairs()[0]) == ["model/t"]


def test_only_what_is_wanted_is_read() -> None:
    whole = content((64, 100_000), torch.int8)
    opened = checkpoint([[local("t", whole, Box((0, 0), (64, 100_000)))]])
    row = blank("t", whole, Box((50, 0), (1, 100_000)))
    assert read(opened, [row]) == 100_000
    column = blank("t", whole, Box((0, 70_000), (64, 10)))
    assert read(opened, [column], unit=4096) <= 64 * 2 * 4096
    for target in (row, column):
        assert torch.equal(target.memory, part_of(whole, target.held.box))


def test_targets_may_be_views_with_strides_of_their_own_and_need_gradients() -> None:
    whole = content((8, 6), torch.float32)
    opened = checkpoint([[local("t", whole, Box((0, 0), (8, 6)))]])
    parameter = torch.nn.Parameter(torch.zeros(6, 8))
    box = held("t", (8, 6), Box((0, 0), (8, 6)))
    read(opened, [LocalBox(box, parameter.t())], most=20)
    assert same_bits(parameter.detach().t(), whole)
    assert parameter.requires_grad
    every_second = torch.zeros(4, 12)[:, ::2]
    read(opened, [LocalBox(held("t", (8, 6), Box((2, 0), (4, 6))), every_second)], most=20)
    assert same_bits(every_second, whole[2:6])


def test_nothing_wanted_is_nothing_read() -> None:
    whole = content((8,), torch.float32)
    opened = checkpoint([[local("t", whole, Box((0,), (8,)))]])
    empty = LocalBox(held("t", (8,), Box((8,), (0,))), torch.zeros(0))
    assert read(opened, [empty]) == read(opened, []) == 0


@settings(max_examples=10)
@given(st.integers(1, 40))
def test_many_boxes_of_one_tensor_look_their_chunks_up(count: int) -> None:
    whole = content((count, count), torch.int8)
    chunks = [Box((n, 0), (1, count)) for n in range(count)]
    opened = checkpoint([[local("t", whole, box) for box in chunks]])
    boxes = [Box((n, n), (1, 1)) for n in range(count)]
    targets = [blank("t", whole, box) for box in boxes]
    assert read(opened, targets) == count
    for target in targets:
        assert torch.equal(target.memory, part_of(whole, target.held.box))


def landings_of(opened: Checkpoint, targets: Sequence[LocalBox]) -> list[ReadTarget]:
    files = Files([file.nbytes for file in opened.index.files], unit_bytes=1)
    planned = ReadTargets(opened.index, wants(opened.index, targets), files, max_gap_bytes=1)
    ((start, stop),) = planned.needs.pairs()
    return planned.land(start, memoryview(bytearray(stop - start)))


def test_large_tensors_are_read_to_their_own_memory_and_the_rest_beside() -> None:
    tensors = {"a": torch.rand(1 << 15), "b": torch.rand(7), "c": torch.rand(1 << 15)}
    opened = checkpoint(
        [[local(name, t, Box((0,), tuple(t.shape))) for name, t in tensors.items()]]
    )
    targets = [blank(name, t, Box((0,), tuple(t.shape))) for name, t in tensors.items()]
    first, between, last = landings_of(opened, targets)
    assert (first.straight, between.straight, last.straight) == (True, False, True)
    for landing, target in ((first, targets[0]), (last, targets[2])):
        landing.view[:4] = torch.full((1,), 7.0).numpy().tobytes()
        assert target.memory[0] == 7
        assert len(landing.view) == target.memory.nbytes


def test_what_has_two_places_or_another_form_is_not_read_straight() -> None:
    tensor = torch.rand(1 << 15)
    box = Box((0,), (1 << 15,))
    opened = checkpoint([[local("a", tensor, box)]])
    twice = [blank("a", tensor, box) for _ in range(2)]
    assert [each.straight for each in landings_of(opened, twice)] == [False]
    strided = LocalBox(held("a", (1 << 15,), box), torch.empty(1 << 16)[::2])
    assert [each.straight for each in landings_of(opened, [strided])] == [False]
    cast = LocalBox(held("a", (1 << 15,), box), torch.empty(1 << 15, dtype=torch.float64))
    assert [each.straight for each in landings_of(opened, [cast])] == [False]


def test_two_stored_tensors_of_one_memory_are_not_read_over_each_other() -> None:
    """A model that ties what was stored apart: one would be compared with the other's digests."""
    box = Box((0,), (1 << 15,))
    tensors = {"a": torch.rand(1 << 15), "b": torch.rand(1 << 15)}
    opened = checkpoint([[local(name, t, box) for name, t in tensors.items()]])
    memory = torch.empty(1 << 15)
    targets = [LocalBox(held(name, (1 << 15,), box), memory) for name in tensors]
    assert not any(each.straight for each in landings_of(opened, targets))
    # Also where they have only a part of it in common.
    memory = torch.empty(3 << 14)
    targets = [
        LocalBox(held("a", (1 << 15,), box), memory[: 1 << 15]),
        LocalBox(held("b", (1 << 15,), box), memory[1 << 14 :]),
    ]
    assert not any(each.straight for each in landings_of(opened, targets))
