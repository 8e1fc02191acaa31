"""Reading against brute force: any stored cut, any wanted box, the very bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt.dcp import reader
from dist_ckpt.dcp.planner import LocalBox
from dist_ckpt.dcp.reader import fill, plan_reads
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.digest import BLOCK_BYTES
from dist_ckpt.repository import Checkpoint
from tests.unit.dcp.boxes import grids, held
from tests.unit.dcp.saved import checkpoint, content, cut, local, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex128)


def read(opened: Checkpoint, targets: Sequence[LocalBox]) -> int:
    """Fill `targets`, as the engine does; return the bytes read."""
    plan = plan_reads(opened.index, targets)
    for segment in plan.segments:
        data = opened.read_blocks(segment.file, segment.start, segment.stop)
        for number in segment.pieces:
            fill(plan.reads[number], segment, data)
    return plan.nbytes


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
        for _ in range(2)
    ]
    read(opened, wanted)
    for target in wanted:
        expected = cut(tensors[target.held.name], target.held.box)
        assert same_bits(target.memory, expected), target.held


@settings(max_examples=20)
@given(st.data())
def test_chunks_of_many_blocks(data: st.DataObject) -> None:
    whole = content((6, 3, 150_000), torch.int8)
    box = data.draw(boxes_in(whole.shape))
    opened = wide(whole)
    target = blank("t", whole, box)
    nbytes = read(opened, [target])
    assert torch.equal(target.memory, cut(whole, box))
    if not target.memory.numel():
        assert nbytes == 0


_opened: list[Checkpoint] = []


def wide(whole: torch.Tensor) -> Checkpoint:
    if not _opened:
        halves = [Box((0, 0, 0), (4, 3, 150_000)), Box((4, 0, 0), (2, 3, 150_000))]
        _opened.append(checkpoint([[local("t", whole, box)] for box in halves]))
    return _opened[0]


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0, 0), (6, 3, 150_000)),
        Box((0, 0, 149_999), (6, 3, 1)),
        Box((1, 2, 7), (5, 1, 100_000)),
        Box((3, 1, 0), (1, 1, 150_000)),
    ],
)
def test_no_read_is_larger_than_the_limit(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_SEGMENT_BYTES", 3 * BLOCK_BYTES)
    whole = content((6, 3, 150_000), torch.int8)
    opened = wide(whole)
    target = blank("t", whole, box)
    plan = plan_reads(opened.index, [target])
    assert max(segment.nbytes for segment in plan.segments) <= 3 * BLOCK_BYTES
    read(opened, [target])
    assert torch.equal(target.memory, cut(whole, box))


def test_only_what_is_wanted_is_read() -> None:
    whole = content((64, 100_000), torch.int8)
    opened = checkpoint([[local("t", whole, Box((0, 0), (64, 100_000)))]])
    target = blank("t", whole, Box((50, 0), (1, 100_000)))
    assert read(opened, [target]) <= 2 * BLOCK_BYTES
    assert torch.equal(target.memory, cut(whole, target.held.box))


def test_targets_may_be_views_with_strides_of_their_own_and_need_gradients() -> None:
    whole = content((8, 6), torch.float32)
    opened = checkpoint([[local("t", whole, Box((0, 0), (8, 6)))]])
    parameter = torch.nn.Parameter(torch.zeros(6, 8))
    box = held("t", (8, 6), Box((0, 0), (8, 6)))
    read(opened, [LocalBox(box, parameter.t())])
    assert same_bits(parameter.detach().t(), whole)
    assert parameter.requires_grad
    every_second = torch.zeros(4, 12)[:, ::2]
    read(opened, [LocalBox(held("t", (8, 6), Box((2, 0), (4, 6))), every_second)])
    assert same_bits(every_second, whole[2:6])


def test_nothing_wanted_is_nothing_read() -> None:
    whole = content((8,), torch.float32)
    opened = checkpoint([[local("t", whole, Box((0,), (8,)))]])
    empty = LocalBox(held("t", (8,), Box((8,), (0,))), torch.zeros(0))
    plan = plan_reads(opened.index, [empty])
    assert (plan.nbytes, list(plan.reads), list(plan.segments)) == (0, [], [])
