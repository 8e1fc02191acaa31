"""What is stored for a tensor that is several behind one face, and how that is laid out.

Where a DTensor has a wrapper subclass for its local tensor, each inner tensor becomes a DTensor, so
that it is stored whole and can be laid out anew. How it is cut is asked of the class itself: a
piece of the rows shows which dimension of which inner tensor the rows are. What shows nothing is
stored as a stack of what each shard has, which loads into the same number of shards only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dist_ckpt.errors import ErrorKind, UsageError
from dist_ckpt.state.layout import Piece, Shape, as_piece, is_wrapped, leaves_of, local_of


def inner_tensors(value: Any, name: str) -> dict[str, Any]:
    """Return what is stored for `value`, by name: itself, or the tensors that it is made of.

    They are the live tensors or aliases: what is loaded into them is what `value` holds.

    Raises:
        UsageError: it is sharded in a way that its class does not let anybody follow.
    """
    return {f"{name}{suffix}": each for suffix, each in pieces(value, name).items()}


def pieces(value: Any, where: str) -> dict[str, Any]:
    """Return as `inner_tensors`, by what comes behind the name; `where` is for messages."""
    if not is_wrapped(value):
        return {"": value}
    local = local_of(value)
    leaves = dict(leaves_of(local))
    with torch.no_grad():
        if isinstance(value, DTensor):
            leaves = _spread(value, leaves, where)
    found: dict[str, Any] = {}
    for suffix, leaf in leaves.items():
        found |= {suffix + more: each for more, each in pieces(leaf, where).items()}
    return found


Cuts = Mapping[str, int | None]
"""By what comes behind the name: which dimension follows the cut one; None for none."""

_cuts: dict[object, Cuts | None] = {}
# A model has a few shapes, and who makes new ones for ever must not fill the memory by that.
_MOST_CUTS = 4096


def cuts_of(local: torch.Tensor, dim: int) -> Cuts | None:
    """Return how the inner tensors of `local` are cut where it is cut in the dimension `dim`.

    None if its class does not say: it cannot be cut there.
    """
    leaves = dict(leaves_of(local))
    # By class and shapes: asking runs code of the class, once and not for each weight alike.
    key = (type(local), local.shape, dim, *((name, leaf.shape) for name, leaf in leaves.items()))
    if key not in _cuts:
        if len(_cuts) >= _MOST_CUTS:
            _cuts.clear()
        with torch.no_grad():
            _cuts[key] = _ask_cuts(local, leaves, dim)
    return _cuts[key]


def _ask_cuts(local: torch.Tensor, leaves: Mapping[str, torch.Tensor], dim: int) -> Cuts | None:
    rows = local.shape[dim] if local.ndim > dim else 0
    # FSDP2 cuts by `chunk`, and others by a slice: a class that can be sharded knows one of them.
    ways: tuple[Callable[[int], Any], ...] = (
        lambda size: torch.split(local, size, dim)[0],
        lambda size: local.narrow(dim, 0, size),
    )
    sizes = [rows // parts for parts in (2, 3, 5, 7, rows) if parts > 1 and not rows % parts]
    # No rows at all, which is all that can be asked of a shard that has one.
    asked = [(size, way) for size in dict.fromkeys(sizes) for way in ways]
    for size, way in [*asked, (0, ways[1])]:
        try:
            cut = dict(leaves_of(way(size)))
        except Exception:
            continue  # by whatever error a class says that it cannot be cut so
        found = _compared(leaves, cut, size, rows)
        if found is not None:
            return found
    return None


def _compared(
    whole: Mapping[str, torch.Tensor], cut: Mapping[str, torch.Tensor], now: int, rows: int
) -> Cuts | None:
    """Return which dimension follows, where `now` of the `rows` of `whole` are left in `cut`."""
    if whole.keys() != cut.keys():
        return None
    found: dict[str, int | None] = {}
    for name, leaf in whole.items():
        pairs = list(zip(leaf.shape, cut[name].shape, strict=False))
        other = [dim for dim, (size, left) in enumerate(pairs) if size != left]
        if leaf.ndim != cut[name].ndim or len(other) > 1:
            return None
        # Not in proportion, as where it is padded: such a cut does not show whose the elements are.
        if other and pairs[other[0]][1] * rows != pairs[other[0]][0] * now:
            return None
        found[name] = other[0] if other else None
    return found


def _spread(
    value: DTensor, leaves: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """Make a DTensor of each inner tensor of the local one."""
    local = local_of(value)
    cutting = shards_of(value)
    if any(local.shape[dim] == 0 for dim in cutting):
        return {}  # an uneven shard that has nothing
    cuts = {dim: cuts_of(local, dim) for dim in cutting}
    found: dict[str, torch.Tensor] = {}
    for suffix, leaf in leaves.items():
        along = {dim: None if cut is None else cut[suffix] for dim, cut in cuts.items()}
        told = all(cut is not None for cut in cuts.values())
        made = _spread_one(value, leaf, along) if told else None
        if made is None:
            made = _stacked(value, leaf, where, suffix)
        found[suffix] = made
    return found


def shards_of(value: DTensor) -> dict[int, int]:
    """Return in how many shards each dimension of `value` is cut, of those that are."""
    found: dict[int, int] = {}
    for mesh_dim, placement in enumerate(value.placements):
        count = value.device_mesh.size(mesh_dim)
        if isinstance(placement, Shard | _StridedShard) and count > 1:
            # Along several dimensions of the mesh, as by FSDP on top of tensor parallelism.
            found[placement.dim] = found.get(placement.dim, 1) * count
    return found


def _spread_one(
    value: DTensor, leaf: torch.Tensor, along: Mapping[int, int | None]
) -> torch.Tensor | None:
    """Return `leaf` as a DTensor cut as `value` is; None if that has no place for its elements."""
    local = local_of(value)
    shape = list(leaf.shape)
    joined, each = None, 1
    for dim, at in along.items():
        if at is None:
            continue
        rows, whole = local.shape[dim], value.shape[dim]
        if leaf.shape[at] % rows == 0:
            each = leaf.shape[at] // rows
            shape[at] = whole
            if each > 1:
                if len(along) > 1:
                    return None
                joined = at
        # Several rows share an element: only where all shards are even is it known whose it is.
        elif whole == rows * shards_of(value)[dim]:
            shape[at] = leaf.shape[at] * (whole // rows)
        else:
            return None
    if joined is not None:
        # A view or nothing: what is loaded into a copy would not arrive in `value`.
        if not leaf.is_contiguous():
            return None
        leaf = leaf.view(*leaf.shape[:joined], -1, each, *leaf.shape[joined + 1 :])
        shape.insert(joined + 1, each)
    return _dtensor(value, leaf, tuple(shape), along, Piece(tuple(value.placements), joined))


def _stacked(value: DTensor, leaf: torch.Tensor, where: str, suffix: str) -> torch.Tensor:
    local, count = local_of(value), 1
    for dim, shards in shards_of(value).items():
        count *= shards
        if local.shape[dim] * shards != value.shape[dim]:
            kind = type(local).__qualname__
            raise UsageError(
                f"cannot store {where}: a {kind} of {list(value.shape)} that is cut unevenly in "
                f"dimension {dim} into {shards} shards, and its class does not show which elements "
                f"of its {suffix.lstrip('.@') or 'tensor'} belong to which rows (split, slice)",
                kind=ErrorKind.UNENCODABLE,
            )
    along = dict.fromkeys(shards_of(value), 0)
    shape = (count, *leaf.shape)
    piece = Piece(tuple(value.placements), stacked=True)
    return _dtensor(value, leaf.unsqueeze(0), shape, along, piece)


def _dtensor(
    value: DTensor,
    leaf: torch.Tensor,
    shape: Shape,
    along: Mapping[int, int | None],
    piece: Piece,
) -> torch.Tensor:
    placements = [_moved(each, along, stacked=piece.stacked) for each in value.placements]
    stride = torch.empty(shape, device="meta").stride()
    # Without the check, which communicates; and with the shape, since torch would take all shards
    # to be as large as this one.
    made = DTensor.from_local(
        leaf, value.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return as_piece(made, piece)


def _moved(placement: Placement, along: Mapping[int, int | None], *, stacked: bool) -> Placement:
    if not isinstance(placement, Shard | _StridedShard):
        return placement
    at = along.get(placement.dim)
    if at is None:
        return Replicate()
    if isinstance(placement, _StridedShard) and not stacked:
        return _StridedShard(at, split_factor=placement.split_factor)
    return Shard(at)


def lay_beside(
    shape: Shape, dtype: torch.dtype, cuts: Mapping[int, int | None], beside: torch.Tensor
) -> torch.Tensor | None:
    """Return an unfilled inner tensor for what is kept beside a tensor; None if it has no place.

    Args:
        shape: as stored.
        dtype: as stored.
        cuts: by dimension of the whole, which one of this follows it; none for what says nothing.
        beside: what the whole is laid out as.
    """
    if not isinstance(beside, DTensor):
        return torch.empty(shape, dtype=dtype, device=beside.device)
    sizes, own = list(shape), local_of(beside)
    shards = shards_of(beside)
    if not all(dim in cuts for dim in shards):
        uneven = any(own.shape[dim] * n != beside.shape[dim] for dim, n in shards.items())
        if uneven or not shape or shape[0] != math.prod(shards.values()):
            return None
        leaf = torch.empty(shape[1:], dtype=dtype, device=own.device)
        return _stacked(beside, leaf, "", "")
    along = {dim: cuts[dim] for dim in shards}
    for dim, at in along.items():
        if at is not None:
            rows = own.shape[dim]
            if sizes[at] * rows % beside.shape[dim]:
                return None
            sizes[at] = sizes[at] * rows // beside.shape[dim]
    leaf = torch.empty(sizes, dtype=dtype, device=own.device)
    return _spread_one(beside, leaf, along)
