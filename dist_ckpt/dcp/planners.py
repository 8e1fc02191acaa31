"""What planners of users do on their own account, and the plan cache of the stock one.

With that cache a rank whose plan did not change sends an empty one that is not `usable`, and takes
what it finished before from a cache of the class, with the storage's data of that earlier save. A
writer has to tell each rank of each save where it writes, so what is left out is put back, and
what was cached during a save is forgotten: plans are made anew each time, as without the cache.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.distributed.checkpoint._nested_dict import (  # type: ignore[attr-defined]  # torch uses it, and lists nothing
    set_element,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)

from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.foreign.dcp_files import value_in

_STOCK = ("torch.distributed.checkpoint.", "dist_ckpt.dcp.")
_LEAVES = (bytes, bytearray, str, io.BytesIO, np.ndarray, torch.Tensor)


@runtime_checkable
class _Lookup(Protocol):
    """What the stock planner has beyond `SavePlanner`: the live value behind an item."""

    def lookup_object(self, index: MetadataIndex) -> object: ...


def is_unchanged(planner: object, *names: str) -> bool:
    """Tell whether `planner` has all these methods, and each as torch or this package wrote it."""
    for name in names:
        method = getattr(planner, name, None)
        written = getattr(method, "__func__", method)
        if not str(getattr(written, "__module__", "")).startswith(_STOCK):
            return False
    return True


def put_as_stock(planner: LoadPlanner, item: ReadItem, value: object) -> bool:
    """Put `value` where torch's own `load_bytes` puts what it reads; return whether it was put.

    That takes a pickle, and to make one and read it again takes longer than all the rest.
    """
    if not isinstance(planner, DefaultLoadPlanner) or not is_unchanged(planner, "load_bytes"):
        return False
    if planner.flatten_state_dict:
        path = planner.mappings[item.dest_index.fqn]
        set_element(planner.original_state_dict, path, value)
    else:
        planner.state_dict[item.dest_index.fqn] = value
    return True


def value_of(planner: SavePlanner, item: WriteItem) -> object:
    """Return the Python value that `planner` wants stored for `item`.

    Stock stores the bytes that `resolve_data` gives, and they are a pickle. Here the value itself
    is stored; a planner that changes it in its own `resolve_data` or `transform_object` has what
    its bytes hold.

    Raises:
        UsageError: the bytes hold something that only a pickle could store, or are none of torch.
    """
    lookup = isinstance(planner, _Lookup)
    live = planner.lookup_object(item.index) if isinstance(planner, _Lookup) else None
    if lookup and is_unchanged(planner, "resolve_data", "transform_object"):
        return live
    given = planner.resolve_data(item)
    if not isinstance(given, io.BytesIO):
        kind = type(given).__qualname__
        raise UsageError(
            f"the planner gave a {kind} for value {item.index.fqn!r}: expected BytesIO"
        )
    data = given.getvalue()
    # Bytes that are the live value, as those of Megatron are, are no pickle of it.
    may_be_live = lookup and given is not live
    is_leaf = isinstance(live, _LEAVES)
    # To read a pickle of many values takes ten times as long as to make one. Of one large leaf it
    # is the other way round.
    if may_be_live and not is_leaf and _is_as_torch_saves(data, live):
        return live
    try:
        return value_in(data)
    except CheckpointError as error:
        # What it did not change is stored as what it is, whatever its type; others were compared.
        if may_be_live and is_leaf and _is_as_torch_saves(data, live):
            return live
        raise UsageError(
            f"{type(planner).__qualname__} gave bytes for {item.index.fqn!r} that are no "
            f"torch.save of plain values ({error.message}): derive it from DefaultSavePlanner and "
            "override lookup_object, which gives the value itself"
        ) from error


class _Compared:
    """A file that keeps nothing: it compares what is written with `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._same = True

    def write(self, piece: bytes) -> int:
        # Never an exception: torch's writer ends the process when it is closed after one.
        self._same = self._same and self._data.startswith(bytes(piece), self._at)
        self._at += len(piece)
        return len(piece)

    def flush(self) -> None:
        pass

    def is_all(self) -> bool:
        return self._same and self._at == len(self._data)


def _is_as_torch_saves(data: bytes, value: object) -> bool:
    compared = _Compared(data)
    try:
        torch.save(value, compared)  # type: ignore[arg-type]  # it writes, and asks for nothing else
    except Exception:  # what pickle cannot take raises whatever it likes, and is other bytes
        return False
    return compared.is_all()


# The plan cache of the stock planner (`enable_plan_caching`), kept out of the way of a save.


# Older torch has no such cache, or fewer of them.
_CACHES = (
    "_cached_save_plan",
    "_cached_final_save_plan",
    "_cached_all_plans",
    "_cached_global_plan",
    "_cached_metadata",
)


def whole_local(plan: SavePlan) -> SavePlan:
    """Return the plan of this rank, out of the cache where `plan` is what stands for it.

    Raises:
        UsageError: planners of several classes have cached plans through other writers.
    """
    if getattr(plan, "usable", True):
        return plan
    known: SavePlan = _only(_cache("_cached_save_plan"))
    return replace(known, usable=True)


def whole_global(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Return the plans of all ranks on rank 0, likewise.

    Raises:
        UsageError: see `whole_local`.
    """
    if all(getattr(plan, "usable", True) for plan in plans):
        return list(plans)
    known: Sequence[SavePlan] = _only(_cache("_cached_global_plan"))
    return [
        plan if plan.usable else replace(whole, usable=True)
        for plan, whole in zip(plans, known, strict=True)
    ]


def forget(planner: SavePlanner) -> None:
    """Forget what `planner` cached: other ranks do so too, in the same place of the same save."""
    key = getattr(planner, "_cached_plans_key", None)
    if getattr(planner, "_enable_plan_caching", False):
        for name in _CACHES:
            _cache(name).pop(key, None)


def forget_global(data: type) -> None:
    """Forget on rank 0 what was cached of plans with storage data of this type.

    The save may fail before its planner is seen, and would leave rank 0 with a cache that the
    others do not have.
    """
    plans_by_key = _cache("_cached_all_plans")
    ours = [
        key
        for key, plans in plans_by_key.items()
        if any(isinstance(plan.storage_data, data) for plan in plans)
    ]
    for key in ours:
        for name in ("_cached_all_plans", "_cached_global_plan", "_cached_metadata"):
            _cache(name).pop(key, None)


def _cache(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = getattr(SavePlanner, name, {})
    return found


def _only(cache: dict[Any, Any]) -> Any:
    # A plan that is left out does not tell which class of planner left it out.
    if len(cache) != 1:
        raise UsageError(
            f"plans of {len(cache)} classes of planners are cached by saves through other writers "
            "(enable_plan_caching=True), and it cannot be told which is meant: make the planner "
            "without it"
        )
    return next(iter(cache.values()))
