"""The items of stock save plans, as dist_ckpt describes boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.errors import UsageError
from dist_ckpt.format.files import DTYPES
from dist_ckpt.format.index import Box, Held, volume
from dist_ckpt.planning.owners import Owned
from dist_ckpt.state.layout import dtype_name

Paths = Mapping[str, Sequence[object]]
"""Where in the state dict each flattened name lies."""


def paths_of(plan: SavePlan) -> Paths:
    """Return what stock planners say of the names in `plan`: nothing where none is flattened."""
    return plan.planner_data if isinstance(plan.planner_data, Mapping) else {}


def box_of(item: WriteItem) -> Box:
    """Return the box that `item` writes, in elements of the global tensor."""
    chunk = _data(item).chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def held_of(item: WriteItem, paths: Paths) -> Held:
    """Return the tensor and the box of `item`.

    Raises:
        UsageError: the format has no such dtype.
    """
    data = _data(item)
    dtype, box = dtype_name(data.properties.dtype), box_of(item)
    if dtype not in DTYPES:
        raise UsageError(f"tensor {item.index.fqn!r} has dtype {dtype}, which cannot be stored")
    part, name = part_and_name(item.index.fqn, paths)
    return Held(part, name, dtype, tuple(data.size), box.offsets, box.sizes)


def tensors_of(plan: SavePlan) -> list[WriteItem]:
    """Return the items of `plan` that are tensors."""
    return [item for item in plan.items if item.type != WriteItemType.BYTE_IO]


def described(
    plan: SavePlan,
    instead: Mapping[int, Sequence[Held]] | None = None,
    aside: Sequence[Held] = (),
) -> tuple[list[Held], list[Owned]]:
    """Return the boxes of the tensors of `plan`, in its order; a rank writes all it is given.

    Args:
        plan: of one rank.
        instead: what is written for some of its tensors, by their number.
        aside: what is written besides, of its Python values.
    """
    paths, others = paths_of(plan), instead or {}
    # The rank that writes and rank 0 that commits both come here: the same items, the same files.
    held: list[Held] = []
    for number, item in enumerate(tensors_of(plan)):
        held += others[number] if number in others else [held_of(item, paths)]
    held += aside
    return held, [Owned(i, box.offsets, box.sizes) for i, box in enumerate(held)]


def without_empty(plans: Iterable[SavePlan]) -> list[SavePlan]:
    """Leave out boxes without elements; a tensor without elements stays once, whole.

    Ranks of an uneven shard hold nothing and say so, each with an item of its own.
    """
    seen: set[str] = set()
    result: list[SavePlan] = []
    for plan in plans:
        items: list[WriteItem] = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or volume(box_of(item)):
                items.append(item)
            # Exactly one chunk, whose box is the whole shape (format-v1, section 5, rule 5).
            elif not all(_data(item).size) and item.index.fqn not in seen:
                seen.add(item.index.fqn)
                items.append(_whole(item))
        result.append(replace(plan, items=items))
    return result


def _whole(item: WriteItem) -> WriteItem:
    data = _data(item)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(data.size)), data.size)
    return replace(item, tensor_data=replace(data, chunk=chunk))


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise UsageError(
            f"the planner describes {item.index.fqn!r} neither as a tensor nor a value"
        )
    return item.tensor_data
