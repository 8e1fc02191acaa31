"""Which elements of a DTensor lie on this rank: computed from its placements, and checked.

DCP's own planning says of each DTensor that one box lies here, where the placements in the order
of the mesh would put it. That is not so for a shard order of one's own, nor for strided shards that
leave gaps. Here each dimension is a list of runs, and what lies here is a box for each combination
of them. A class of placement that nobody here knows is refused: its elements may be anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dist_ckpt.errors import UsageError
from dist_ckpt.format.index import Box
from dist_ckpt.state.layout import local_of, shard_order_of

_Run = tuple[int, int]
"""Where a run of elements starts in the global tensor, and how many they are."""

# A subclass that changes nothing but how it is shown, or how it compares, places as its base does.
_SHOWN = frozenset(dir(object)) | {"__module__", "__doc__", "__dict__", "__weakref__", "__slots__"}
_KNOWN = (Shard, _StridedShard, Replicate)


def boxes_here(tensor: DTensor, where: str) -> list[tuple[Box, Box]]:
    """Return the boxes of `tensor` on this rank: in the global tensor, and in the local one.

    None where this rank is not part of its mesh. A rank without elements has one empty box.

    Args:
        tensor: a DTensor without partial sums.
        where: what it is called, for messages.

    Raises:
        UsageError: it is of placements that cannot be followed, or the local tensor is of another
            shape than they say.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    for placement in tensor.placements:
        _check_known(placement, where)
    runs: list[list[_Run]] = [[(0, size)] for size in tensor.shape]
    for mesh_dim in _order(tensor):
        placement = tensor.placements[mesh_dim]
        if isinstance(placement, Shard | _StridedShard):
            count, number = tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim]
            # A dimension may be counted from the end.
            dim = placement.dim % max(tensor.ndim, 1)
            runs[dim] = list(_split(runs[dim], placement, count, number))
    found = tuple(local_of(tensor).shape)
    said = tuple(sum(size for _, size in each) for each in runs)
    if found != said:
        raise UsageError(
            f"{where} has the placements {tensor.placements} on {tensor.device_mesh}, by which "
            f"{list(said)} of {list(tensor.shape)} would lie on this rank, and {list(found)} does: "
            "distribute it as its placements say before it is saved or loaded"
        )
    return list(_combined(runs, tensor.shape))


def check_as_stock(tensor: object, where: str) -> None:
    """Check that a DTensor lies where torch's own planning says, which another one relies on.

    Raises:
        UsageError: it does not: its elements would be written to, or read from, wrong places.
    """
    if not isinstance(tensor, DTensor):
        return
    # Nearly always, and then nothing has to be computed.
    if all(type(each) in (Shard, Replicate) for each in tensor.placements):
        order = _order(tensor)
        if order == sorted(order):
            return
    found = [there for there, _ in boxes_here(tensor, where)]
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # Of no elements it does not matter where they would be.
    if found and found != [Box(tuple(offsets), tuple(sizes))] and 0 not in sizes:
        raise UsageError(
            f"{where} is laid out by {tensor.placements} in the shard order "
            f"{shard_order_of(tensor)}, which torch's planning of saves and loads does not "
            "describe: redistribute it, or use dist_ckpt.save and dist_ckpt.load"
        )


def _order(tensor: DTensor) -> list[int]:
    """Return the dimensions of the mesh in the order in which they cut the tensor."""
    order = list(range(len(tensor.placements)))
    explicit = shard_order_of(tensor)
    if not explicit or any(isinstance(each, _StridedShard) for each in tensor.placements):
        return order  # strided shards are made for going from left to right
    # Of two that cut different dimensions of the tensor it does not matter which is the first.
    cutting = [mesh_dim for entry in explicit for mesh_dim in entry.mesh_dims]  # type: ignore[attr-defined]
    return cutting + [mesh_dim for mesh_dim in order if mesh_dim not in cutting]


def _check_known(placement: Placement, where: str) -> None:
    if type(placement) in _KNOWN:
        return
    base = next((each for each in _KNOWN if isinstance(placement, each)), None)
    if base is not None:
        own = (cls for cls in type(placement).__mro__ if cls not in base.__mro__)
        if all(name in _SHOWN or not hasattr(base, name) for cls in own for name in vars(cls)):
            return
    raise UsageError(
        f"{where} has the placement {placement!r} of the class {type(placement).__qualname__}, "
        "which may put elements anywhere: redistribute it to Shard and Replicate of torch before "
        "it is saved or loaded"
    )


def _split(runs: Sequence[_Run], placement: Placement, count: int, number: int) -> Iterator[_Run]:
    """Yield what of `runs` is part `number` of `count`, of a dimension that `placement` cuts."""
    length = sum(size for _, size in runs)
    if not isinstance(placement, _StridedShard):
        # As torch.chunk cuts: the last parts may be smaller, or of no element.
        most = -(-length // count)
        start = min(most * number, length)
        yield from _between(runs, start, min(start + most, length))
        return
    flat = torch.arange(length)
    # By the very method that torch distributes with, on numbers in place of elements.
    of_dim = _StridedShard(0, split_factor=placement.split_factor)
    pieces, _ = of_dim._split_tensor(flat, count, with_padding=False, contiguous=True)  # noqa: SLF001
    mine = pieces[number]
    if len(mine):
        ends = torch.nonzero(mine.diff() != 1).flatten().add(1).tolist()
        for first, last in zip([0, *ends], [*ends, len(mine)], strict=True):
            start = int(mine[first])
            yield from _between(runs, start, start + last - first)


def _between(runs: Sequence[_Run], start: int, stop: int) -> Iterator[_Run]:
    """Yield the elements from number `start` to `stop` of what `runs` are together."""
    at = 0
    for first, size in runs:
        low, high = max(start, at), min(stop, at + size)
        if low < high:
            yield first + low - at, high - low
        at += size


def _combined(runs: Sequence[list[_Run]], shape: Sequence[int]) -> Iterator[tuple[Box, Box]]:
    placed: list[list[tuple[int, int, int]]] = []
    for of_dim, size in zip(runs, shape, strict=True):
        at, joined = 0, []
        # Where nothing lies here there is one empty run, so that the rank has a box to name.
        for start, length in _joined(of_dim) or [(size, 0)]:
            joined.append((start, at, length))
            at += length
        placed.append(joined)
    for each in product(*placed):
        sizes = tuple(length for _, _, length in each)
        there = Box(tuple(start for start, _, _ in each), sizes)
        yield there, Box(tuple(at for _, at, _ in each), sizes)


def _joined(runs: Sequence[_Run]) -> list[_Run]:
    found: list[_Run] = []
    for start, size in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
    return found
