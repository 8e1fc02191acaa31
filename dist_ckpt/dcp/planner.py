"""A planner for torch.distributed.checkpoint that shares replicas out by rows.

The stock planner gives a replicated tensor whole to one rank. This one cuts it, so that every rank
writes about the same number of bytes, by the decision that the saves of dist_ckpt use.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dist_ckpt.dcp.edge import plain_errors
from dist_ckpt.dcp.items import box_of, held_of, paths_of
from dist_ckpt.format.index import Box, volume
from dist_ckpt.planning.owners import decide
from dist_ckpt.staging.arena import view_box
from dist_ckpt.state.layout import is_wrapped


class Planner(DefaultSavePlanner):
    """Splits what several ranks hold over them, whatever the storage writer is.

    ```python
    import torch
    import torch.distributed.checkpoint as dcp
    from dist_ckpt.dcp import Planner, Writer

    state_dict = {"model": torch.nn.Linear(4, 1).state_dict()}
    dcp.save(state_dict, storage_writer=Writer("runs/17"), planner=Planner())
    ```

    Python values are written by the lowest rank that has them.

    Args:
        flatten_state_dict: name the leaves of nested dicts, as stock; False leaves each value
            below the top level, tensors included, to be stored as one Python value.
    """

    def __init__(self, *, flatten_state_dict: bool = True) -> None:
        super().__init__(flatten_state_dict=flatten_state_dict)
        self._held: dict[str, list[Box]] = {}

    def create_local_plan(self) -> SavePlan:
        """Describe what this rank holds; see `SavePlanner.create_local_plan`."""
        plan = super().create_local_plan()
        # Of this save alone: one planner may serve several, each with other boxes.
        self._held = {}
        items = list(plan.items)
        for number, item in enumerate(items):
            if item.tensor_data is None:
                continue
            self._held.setdefault(item.index.fqn, []).append(box_of(item))
            if is_wrapped(self.state_dict[item.index.fqn]):
                # Rows of it are no rows of what it is made of: one rank writes all of a shard.
                items[number] = replace(item, tensor_data=_Whole(**vars(item.tensor_data)))
        self.plan = replace(plan, items=items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Decide on the coordinator who writes what; see `SavePlanner.create_global_plan`.

        Raises:
            IncompatibleError: the ranks together do not hold every tensor exactly, or differ in
                the shape or dtype of one.
        """
        # Of all ranks, for a rank that has an entry under another path must not split its tensor.
        paths = dict(ChainMap(*(dict(paths_of(plan)) for plan in all_plans)))
        with plain_errors():
            # On rank 0 alone, from where torch sends errors to the others as pickles.
            held = [[held_of(item, paths) for item in _rows(plan)] for plan in all_plans]
            owned = decide(held)
        values: set[MetadataIndex] = set()
        plans: list[SavePlan] = []
        for plan, boxes in zip(all_plans, owned, strict=True):
            tensors = list(_rows(plan))
            items = [_piece(tensors[each.held], each.box) for each in boxes]
            for item in plan.items:
                if not _has_rows(item) and item.index not in values:
                    values.add(item.index)
                    items.append(item)
            plans.append(replace(plan, items=items))
        # After the cut, for the metadata have to describe the chunks as they are written.
        plans, metadata = create_default_global_save_plan(plans)
        if self.flatten_state_dict:
            metadata = replace(metadata, planner_data=paths)
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the rows that `write_item` names, a view; see `SavePlanner.resolve_data`."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        fqn, box = write_item.index.fqn, box_of(write_item)
        # A tensor without elements is planned whole, wherever its nothing lies.
        empty = volume(box) == 0
        held = next(each for each in self._held[fqn] if empty or _contains(each, box))
        found = self.lookup_object(MetadataIndex(fqn, held.offsets))
        whole = empty or held == box
        view = found if whole else view_box(found, box, origin=held.offsets)
        return self.transform_object(write_item, view)


class _Whole(TensorWriteData):
    """Marks what cannot be written in part, on its way to the coordinator."""


def _has_rows(item: WriteItem) -> bool:
    return item.type != WriteItemType.BYTE_IO and not isinstance(item.tensor_data, _Whole)


def _rows(plan: SavePlan) -> Iterator[WriteItem]:
    """Yield the items of tensors that can be cut by rows."""
    return filter(_has_rows, plan.items)


def _piece(item: WriteItem, box: Box) -> WriteItem:
    """Return `item` cut down to `box`."""
    if item.tensor_data is None or box == box_of(item):
        return item
    chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
    return replace(
        item,
        # Of a plain tensor too: more than one item of it is not taken otherwise.
        type=WriteItemType.SHARD,
        index=MetadataIndex(item.index.fqn, box.offsets),
        tensor_data=replace(item.tensor_data, chunk=chunk),
    )


def _contains(outer: Box, inner: Box) -> bool:
    return all(
        low <= start and start + size <= low + width
        for low, width, start, size in zip(
            outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True
        )
    )
