from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_ckpt.errors import UsageError
from dist_ckpt.format.index import (
    Box,
    check_cover,
    element_span,
    find_uncovered,
    intersect,
    is_whole,
    run_boxes,
    split_rows,
    volume,
)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    pairs = zip(shape, offsets, strict=True)
    return Box(offsets, tuple(draw(st.integers(0, size - start)) for size, start in pairs))


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def elements(box: Box) -> list[tuple[int, ...]]:
    """Every index of `box`, in C order: what the arithmetic is compared with."""
    pairs = zip(box.offsets, box.sizes, strict=True)
    return list(itertools.product(*(range(start, start + size) for start, size in pairs)))


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def cover(shape: tuple[int, ...], boxes: list[Box]) -> str | None:
    count, ndim = len(boxes), len(shape)
    starts = np.array([box.offsets for box in boxes], np.int64).reshape(count, ndim)
    sizes = np.array([box.sizes for box in boxes], np.int64).reshape(count, ndim)
    return check_cover(shape, starts, sizes)


@given(st.data(), SHAPES)
def test_volume_and_intersection_agree_with_the_elements(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    first, second = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    assert volume(first) == len(elements(first))
    common = intersect(first, second)
    expected = sorted(set(elements(first)) & set(elements(second)))
    assert (elements(common) if common is not None else []) == expected
    assert intersect(second, first) == common
    assert is_whole(first, shape) == (first == whole(shape))


def test_boxes_of_different_dimensions_are_refused() -> None:
    with pytest.raises(UsageError, match="dimensions"):
        intersect(Box((0,), (1,)), Box((), ()))


@given(st.data(), SHAPES, st.integers(1, 7))
def test_pieces_are_the_box_in_order(
    data: st.DataObject, shape: tuple[int, ...], pieces: int
) -> None:
    box = data.draw(boxes_in(shape))
    parts = split_rows(box, pieces)
    assert [index for part in parts for index in elements(part)] == elements(box)
    assert 1 <= len(parts) <= pieces
    if volume(box) == 0:
        assert parts == [box]
        return
    sizes = [volume(part) for part in parts]
    assert min(sizes) > 0
    assert sizes == sorted(sizes, reverse=True)
    rows = next((size for size in box.sizes if size > 1), 1)
    assert len(parts) == min(pieces, rows)
    assert max(sizes) - min(sizes) <= volume(box) // rows
    for part in parts:
        first, stop = element_span(box, part)
        assert stop - first == volume(part)


def test_a_box_is_cut_into_at_least_one_piece() -> None:
    with pytest.raises(UsageError, match="at least one"):
        split_rows(Box((0,), (4,)), 0)


@given(st.data(), SHAPES)
def test_the_span_is_from_the_first_to_the_last_element(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    outer = data.draw(boxes_in(shape))
    relative = data.draw(boxes_in(outer.sizes))
    offsets = tuple(a + b for a, b in zip(outer.offsets, relative.offsets, strict=True))
    inner = Box(offsets, relative.sizes)
    order = elements(outer)
    positions = [order.index(index) for index in elements(inner)]
    expected = (min(positions), max(positions) + 1) if positions else (0, 0)
    assert element_span(outer, inner) == expected


@pytest.mark.parametrize("inner", [Box((0,), (3,)), Box((4,), (2,))])
def test_a_span_of_what_is_outside_is_refused(inner: Box) -> None:
    with pytest.raises(UsageError, match="not inside"):
        element_span(Box((1,), (4,)), inner)


@given(st.data(), st.lists(st.integers(1, 4), max_size=4).map(tuple))
def test_the_boxes_of_a_run_hold_its_elements_in_order(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    outer = Box(tuple(range(len(shape))), shape)
    order = elements(outer)
    first = data.draw(st.integers(0, len(order) - 1))
    stop = data.draw(st.integers(first + 1, len(order)))
    boxes = run_boxes(outer, first, stop)
    assert [index for box in boxes for index in elements(box)] == order[first:stop]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(("first", "stop"), [(0, 0), (3, 2), (-1, 2), (0, 7)])
def test_a_run_of_what_is_outside_is_refused(first: int, stop: int) -> None:
    with pytest.raises(UsageError, match="not inside"):
        run_boxes(Box((1, 0), (2, 3)), first, stop)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that tile it: cut again and again, anywhere, and shuffled."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [i for i, size in enumerate(box.sizes) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = draw(st.sampled_from(dims))
        at = draw(st.integers(1, box.sizes[dim] - 1))
        for start, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += start
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return shape, draw(st.permutations(boxes))


@given(tilings())
def test_a_tiling_covers(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    assert cover(*tiling) is None


@given(tilings(), st.data())
def test_cover_agrees_with_a_count_of_each_element(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    boxes = list(boxes)
    for _ in range(data.draw(st.integers(1, 2))):
        spot = data.draw(st.integers(0, len(boxes) - 1))
        boxes[spot : spot + data.draw(st.integers(0, 1))] = data.draw(
            st.lists(boxes_in(shape), max_size=2)
        )
        if not boxes:
            break
    counts: NDArray[np.int64] = np.zeros(shape, np.int64)
    for box in boxes:
        for index in elements(box):
            counts[index] += 1
    tiled = bool((counts == 1).all()) and all(volume(box) for box in boxes)
    problem = cover(shape, boxes)
    assert (problem is None) == tiled
    if problem is not None and all(volume(box) for box in boxes):
        assert ("overlap" in problem) or (counts == 0).any()
        assert ("missing" in problem) or (counts > 1).any()


def test_pinwheels_cover() -> None:
    pinwheel = [
        Box((0, 0), (1, 2)),
        Box((0, 2), (2, 1)),
        Box((2, 1), (1, 2)),
        Box((1, 0), (2, 1)),
        Box((1, 1), (1, 1)),
    ]
    assert cover((3, 3), pinwheel) is None
    assert cover((3, 3), pinwheel[:-1]) == "missing: its 4 chunks hold 8 elements, the tensor has 9"
    assert "overlap: its 6 chunks" in str(cover((3, 3), [*pinwheel, pinwheel[0]]))


def test_an_overlap_that_hides_a_gap_is_found() -> None:
    assert "overlap and missing" in str(cover((4,), [Box((0,), (2,)), Box((1,), (2,))]))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        (Box((-1,), (2,)), "out of bounds"),
        (Box((0,), (-1,)), "out of bounds"),
        (Box((3,), (2,)), "out of bounds"),
        (Box((2**62,), (2**62,)), "out of bounds"),
        (Box((-(2**63),), (2**63 - 1,)), "out of bounds"),
        (Box((0,), (0,)), "overlap"),
    ],
)
def test_a_chunk_that_cannot_be_is_named(box: Box, problem: str) -> None:
    assert problem in str(cover((4,), [box, Box((0,), (4,))]))


def test_tensors_of_no_dimension_have_one_chunk() -> None:
    assert cover((), [Box((), ())]) is None
    assert "missing" in str(cover((), []))
    assert "overlap" in str(cover((), [Box((), ())] * 2))


def test_tensors_without_elements_have_one_chunk_of_their_shape() -> None:
    assert cover((0, 3), [Box((0, 0), (0, 3))]) is None
    assert cover((2**62, 2**62, 0), [Box((0, 0, 0), (2**62, 2**62, 0))]) is None
    assert "missing" in str(cover((0, 3), []))
    assert "overlap" in str(cover((0, 3), [Box((0, 0), (0, 3))] * 2))
    assert "overlap" in str(cover((0, 3), [Box((0, 0), (0, 2))]))


def test_a_claim_of_2_to_the_60_elements_is_only_a_number() -> None:
    half = 2**59
    assert cover((2**60,), [Box((0,), (half,)), Box((half,), (half,))]) is None
    assert "missing" in str(cover((2**30, 2**30), [Box((0, 0), (1, 2**30))]))
    assert "overlap" in str(cover((2**62, 1), [Box((0, 0), (2**62, 1))] * 5))


def test_a_cut_in_the_last_of_many_dimensions_is_checked() -> None:
    shape = (2,) * 40 + (1,) * 23 + (2,)
    halves = [Box((0,) * 63 + (i,), (*shape[:63], 1)) for i in (1, 0)]
    assert cover(shape, halves) is None
    assert "missing" in str(cover(shape, halves[:1]))


def test_boxes_that_never_cancel_are_given_up_not_expanded() -> None:
    # Corners double with every dimension: without a limit there would be 2**31 of them.
    problem = cover((4,) * 30, [Box((0,) * 30, (3,) * 30), Box((1,) * 30, (3,) * 30)])
    assert problem == "overlap or missing: it is cut in too many dimensions to be checked"


def test_the_bad_tensor_of_a_table_is_named() -> None:
    shapes = np.array([[4, 2], [4, 2], [1, 1]], np.int64)
    counts = np.array([2, 2, 1], np.int64)
    starts = np.array([[0, 0], [2, 0], [0, 0], [0, 1], [0, 0]], np.int64)
    sizes = np.array([[2, 2], [2, 2], [4, 1], [4, 1], [1, 1]], np.int64)
    assert find_uncovered(shapes, counts, starts, sizes) is None
    sizes[3] = (3, 1)
    bad = find_uncovered(shapes, counts, starts, sizes)
    assert bad == (1, "missing: its 2 chunks hold 7 elements, the tensor has 8")
    assert find_uncovered(shapes[:0], counts[:0], starts[:0], sizes[:0]) is None
