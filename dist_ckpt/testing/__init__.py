"""For people who test what they build on dist_ckpt: failing stores, and what a store must do.

`StoreContract` needs pytest, so each name is imported when it is first used. What runs functions
on several ranks needs torch and has a room of its own, `dist_ckpt.testing.ranks`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_ckpt.testing.contract import StoreContract
    from dist_ckpt.testing.stores import (
        CHANGES,
        OPERATIONS,
        CrashStore,
        Fail,
        FaultyStore,
        Flip,
        Hang,
        LatencyStore,
        Operation,
        Rule,
        Truncate,
    )

__all__ = [
    "CHANGES",
    "OPERATIONS",
    "CrashStore",
    "Fail",
    "FaultyStore",
    "Flip",
    "Hang",
    "LatencyStore",
    "Operation",
    "Rule",
    "StoreContract",
    "Truncate",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "contract" if name == "StoreContract" else "stores"
    value: object = getattr(import_module(f"{__name__}.{room}"), name)
    return value
