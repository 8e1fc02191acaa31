"""Boxes: axis-aligned blocks of elements of a tensor, and what can be computed from them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ckpt.errors import UsageError
from dist_ckpt.format.cover import check_cover

__all__ = [
    "Box",
    "check_cover",
    "element_span",
    "intersect",
    "is_whole",
    "run_boxes",
    "split_rows",
    "volume",
]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `offsets[i] <= index[i] < offsets[i] + sizes[i]` of a tensor.

    A box of a 0-dim tensor has no offsets and holds its one element.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def volume(box: Box) -> int:
    """Return the number of elements of `box`."""
    return math.prod(box.sizes)


def intersect(first: Box, second: Box) -> Box | None:
    """Return the box of the elements that both hold, or None where there is none.

    Raises:
        UsageError: the boxes differ in their number of dimensions.
    """
    _check_ndim(first, second)
    offsets = tuple(max(a, b) for a, b in zip(first.offsets, second.offsets, strict=True))
    ends = map(min, _stops(first), _stops(second))
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def is_whole(box: Box, shape: Sequence[int]) -> bool:
    """Tell whether `box` is all of a tensor of `shape`."""
    return not any(box.offsets) and box.sizes == tuple(shape)


def split_rows(box: Box, pieces: int) -> list[Box]:
    """Cut `box` along its first dimension of more than one element, in order of its elements.

    Each piece is contiguous in the C order of `box`; sizes differ by at most one row, the larger
    ones first. There are never more pieces than rows, so none is empty; a box of no element or of
    one comes back as it is.

    Raises:
        UsageError: `pieces` is less than one.
    """
    if pieces < 1:
        raise UsageError(f"cannot split a box into {pieces} pieces: ask for at least one")
    dim = next((i for i, size in enumerate(box.sizes) if size > 1), None)
    if dim is None or volume(box) == 0:
        return [box]
    rows = box.sizes[dim]
    count = min(pieces, rows)
    short, longer = divmod(rows, count)
    result: list[Box] = []
    start = box.offsets[dim]
    for i in range(count):
        size = short + (i < longer)
        offsets = (*box.offsets[:dim], start, *box.offsets[dim + 1 :])
        result.append(Box(offsets, (*box.sizes[:dim], size, *box.sizes[dim + 1 :])))
        start += size
    return result


def element_span(outer: Box, inner: Box) -> tuple[int, int]:
    """Return the smallest range (first, stop) of elements of `outer` that covers `inner`.

    Elements are counted in the C order of `outer`, from its first one. An `inner` without
    elements has the span (0, 0).

    Raises:
        UsageError: `inner` is not inside `outer`.
    """
    _check_ndim(outer, inner)
    if volume(inner) == 0:
        return 0, 0
    inside = zip(outer.offsets, inner.offsets, _stops(inner), _stops(outer), strict=True)
    if not all(low <= start and stop <= high for low, start, stop, high in inside):
        raise UsageError(f"{inner} is not inside {outer}: intersect them first")
    first = last = 0
    for dim, width in enumerate(outer.sizes):
        start = inner.offsets[dim] - outer.offsets[dim]
        first = first * width + start
        last = last * width + start + inner.sizes[dim] - 1
    return first, last + 1


def run_boxes(outer: Box, first: int, stop: int) -> list[Box]:
    """Return the boxes that hold the elements `first` up to `stop` of `outer`, in their order.

    Elements are counted as in `element_span`. At most two boxes for each dimension: the rest of
    the row that `first` is in, whole rows, and the begin of the row that `stop` is in.

    Raises:
        UsageError: the elements are none, or not inside `outer`.
    """
    if not 0 <= first < stop <= volume(outer):
        raise UsageError(f"elements {first} to {stop} are not inside {outer}, or none")
    return [
        Box(tuple(a + b for a, b in zip(outer.offsets, offsets, strict=True)), sizes)
        for offsets, sizes in _runs(outer.sizes, first, stop)
    ]


_Run = tuple[tuple[int, ...], tuple[int, ...]]


def _runs(sizes: tuple[int, ...], first: int, stop: int) -> list[_Run]:
    """Return (offsets, sizes) of `run_boxes`, relative to the outer box."""
    if not sizes:
        return [((), ())]
    inner = sizes[1:]
    row_elements = math.prod(inner)
    row, begin = divmod(first, row_elements)
    last, end = divmod(stop, row_elements)
    if row == last:
        return _in_row(row, _runs(inner, begin, end))
    head: list[_Run] = []
    if begin:
        head = _in_row(row, _runs(inner, begin, row_elements))
        row += 1
    rows = [((row, *(0 for _ in inner)), (last - row, *inner))] if row < last else []
    tail = _in_row(last, _runs(inner, 0, end)) if end else []
    return [*head, *rows, *tail]


def _in_row(row: int, runs: Sequence[_Run]) -> list[_Run]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in runs]


def _stops(box: Box) -> list[int]:
    return [start + size for start, size in zip(box.offsets, box.sizes, strict=True)]


def _check_ndim(first: Box, second: Box) -> None:
    if len(first.offsets) != len(second.offsets):
        raise UsageError(f"{first} and {second} differ in their number of dimensions")
