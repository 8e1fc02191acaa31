"""Targets that have memory in common: found by where their elements lie, byte by byte at need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.format.boxes import check_cover
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.staging.copies import reach

Bytes: TypeAlias = NDArray[np.uint8]


def clusters(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Return the numbers of targets that reach into one another's memory, each group in order.

    Raises:
        IncompatibleError: the elements of one target are themselves one memory.
    """
    extents: dict[torch.device, list[tuple[int, int, int]]] = {}
    for number, each in enumerate(wanted):
        memory = each.local.memory
        nbytes = memory.nbytes
        if not nbytes:
            continue
        if not memory.is_contiguous():  # most are, and every load asks this of every tensor
            _check_apart(each)
            nbytes = reach(memory) * memory.itemsize
        start = memory.data_ptr()
        extents.setdefault(memory.device, []).append((start, start + nbytes, number))
    groups: list[list[int]] = []
    for found in extents.values():
        end = -1
        for start, stop, number in sorted(found):
            if start >= end:
                groups.append([])
            groups[-1].append(number)
            end = max(end, stop)
    # By the order of the state and not of addresses, so that a message is the same every time.
    return sorted(sorted(group) for group in groups if len(group) > 1)


def overlap(views: Sequence[Wanted]) -> bool:
    """Tell whether any two of these views, or of their elements, have a byte in common."""
    # The columns of one matrix reach into one another, and have nothing in common.
    if len(views) == 1 or _tile(views):
        return False
    return WrittenMemory(views).fill() != sum(each.local.memory.nbytes for each in views)


def _tile(views: Sequence[Wanted]) -> bool:
    """Tell, without a look at each element, whether these are the tiles of one target.

    Stock DCP asks for each stored chunk of a target by itself.
    """
    first = views[0]
    strides, dtype = first.local.memory.stride(), first.local.memory.dtype
    like = first.tensor, strides, dtype, _origin(first)
    if any(
        (v.tensor, v.local.memory.stride(), v.local.memory.dtype, _origin(v)) != like for v in views
    ):
        return False
    starts = np.array([each.local.held.offsets for each in views], np.int64)
    sizes = np.array([each.local.held.sizes for each in views], np.int64)
    low = starts.min(axis=0)
    shape: list[int] = ((starts + sizes).max(axis=0) - low).tolist()
    return _is_apart(shape, strides) and check_cover(shape, starts - low, sizes) is None


def _origin(each: Wanted) -> int:
    """Return where the first element of the whole tensor would be, by this box of it."""
    memory, offsets = each.local.memory, each.local.held.offsets
    steps = zip(offsets, memory.stride(), strict=True)
    return memory.data_ptr() - sum(at * step for at, step in steps) * memory.itemsize


def _is_apart(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether each step leads past all that the smaller ones reach: then none is one twice."""
    end = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < end:
                return False
            end += (size - 1) * stride
    return True


def _check_apart(each: Wanted) -> None:
    """Check that the elements of one target are not one memory, as those of an expanded one."""
    memory = each.local.memory
    if _is_apart(memory.shape, memory.stride()):
        return
    # What reaches into a wider step may still miss it: that is looked at element by element.
    if WrittenMemory([each]).fill() != memory.nbytes:
        raise IncompatibleError(
            f"{full_name(each)}: several elements of the tensor to be filled are one memory (it "
            "was expanded), and can have one value only: give it memory of its own (.clone()); "
            "nothing was changed"
        )


class WrittenMemory:
    """The memory of several targets as bytes on this host, to see what they would make of it."""

    def __init__(self, members: Sequence[Wanted]) -> None:
        memories = [each.local.memory for each in members]
        starts = [memory.data_ptr() for memory in memories]
        first = min(starts)
        stops = [_stop(memory) for memory in memories]
        self._bytes: Bytes = np.zeros(max(stops) - first, np.uint8)
        self._views = [
            _view(self._bytes, memory, start - first)
            for memory, start in zip(memories, starts, strict=True)
        ]

    def put(self, number: int, value: torch.Tensor) -> None:
        """Write `value` to member `number`, over whatever others wrote there."""
        view = self._views[number]
        view[...] = flat_bytes(value).reshape(view.shape)

    def has(self, number: int, value: torch.Tensor) -> bool:
        """Tell whether member `number` is `value`, bit for bit."""
        view = self._views[number]
        return np.array_equal(view, flat_bytes(value).reshape(view.shape))

    def fill(self) -> int:
        """Write to every view; return to how many bytes."""
        for view in self._views:
            view[...] = 1
        return int(np.count_nonzero(self._bytes))


def _view(data: Bytes, memory: torch.Tensor, offset: int) -> Bytes:
    """Return the bytes of each element of `memory`, which begins at `offset` of `data`."""
    item = memory.itemsize
    strides = (*(step * item for step in memory.stride()), 1)
    return np.ndarray((*memory.shape, item), np.uint8, data, offset, strides)


def lie(memory: torch.Tensor) -> object:
    """Return what two views have in common only if they are the same elements in one order."""
    # The stride of a single row means nothing.
    steps = zip(memory.stride(), memory.shape, strict=True)
    strides = tuple(stride if size > 1 else 0 for stride, size in steps)
    return (
        memory.data_ptr(),
        memory.shape,
        strides,
        memory.dtype,
        memory.is_conj(),
        memory.is_neg(),
    )


def in_memory(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what is in the memory of `target` when it has taken `value`, on this host."""
    value = value.to(target.dtype)
    if target.is_conj():
        value = value.conj_physical()
    return -value if target.is_neg() else value


def _stop(memory: torch.Tensor) -> int:
    return memory.data_ptr() + reach(memory) * memory.itemsize


def flat_bytes(value: torch.Tensor) -> Bytes:
    """Return the bytes of the elements of a tensor on this host, in their order."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def full_name(each: Wanted) -> str:
    """Return `part/name` as the state has it."""
    return f"{each.local.held.part}/{each.local.held.name}"
