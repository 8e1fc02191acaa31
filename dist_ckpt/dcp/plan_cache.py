"""The plan cache of the stock planner (`enable_plan_caching`), kept out of the way of a save.

With it a rank whose plan did not change sends an empty one that is not `usable`, and takes what
it finished before from a cache of the class, with the storage's data of that earlier save. A
writer has to tell each rank of each save where it writes, so what is left out is put back, and
what was cached during a save is forgotten: plans are made anew each time, as without the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dist_ckpt.errors import UsageError

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
