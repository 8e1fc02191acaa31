"""What is planned with torch.distributed.checkpoint, the only room that knows it.

Public are `Writer`, `Reader` and `Planner`, for programs that call torch.distributed.checkpoint
themselves. They are imported when first used: the rest of this room serves the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_ckpt.dcp.planner import Planner
    from dist_ckpt.dcp.reader import Reader
    from dist_ckpt.dcp.writer import Writer

__all__ = ["Planner", "Reader", "Writer"]

_HOMES = {
    "Planner": "dist_ckpt.dcp.planner",
    "Reader": "dist_ckpt.dcp.reader",
    "Writer": "dist_ckpt.dcp.writer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value
