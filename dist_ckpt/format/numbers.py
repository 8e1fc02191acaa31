"""Whole numbers as callers give them."""

from __future__ import annotations

from operator import index
from typing import Any


def as_integer(value: Any) -> int | None:
    """Return an integer of whatever type, of numpy or torch too, as an `int`; None for all else.

    A boolean is none: where a number is asked for it is a slip.
    """
    # A tensor of torch.bool says that it is an index.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except Exception:  # a foreign __index__ may do anything
        return None
