"""Bounds on what bytes may claim, checked before anything is multiplied, hashed or allocated."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from operator import index
from typing import Any

# Whole numbers as callers give them.


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


MAX_NDIM = 64
"""Of a tensor of torch, and of an array of numpy."""

INT64_MAX = 2**63 - 1
_MAX_EQUAL_HASHES = 64
# Fewer keys than this cannot take long, however they collide.
_FEW = 256


def count_elements(shape: Sequence[object]) -> int:
    """Return how many elements a tensor of `shape` has.

    Raises:
        ValueError: an entry is no whole number from 0 on, there are more than 64 of them, or the
            number of elements, empty dimensions left out, is more than 64 bits hold.
    """
    if len(shape) > MAX_NDIM:
        raise ValueError(f"it claims {len(shape)} dimensions, more than {MAX_NDIM}")
    sizes: list[int] = []
    for size in shape:
        if type(size) is not int or not 0 <= size <= INT64_MAX:
            raise ValueError("it claims a dimension that no tensor has")
        sizes.append(size)
    # Strides are products of sizes, so those of an empty tensor must fit too.
    if math.prod(size for size in sizes if size) > INT64_MAX:
        raise ValueError("it claims more elements than 2**63 bytes hold")
    return math.prod(sizes)


class HashCounts:
    """Finds keys that were made to collide, before a dict or a set compares all with all.

    Hashes of text and bytes are salted by the interpreter; those of numbers and tuples anybody can
    compute backwards. Only equal hashes cost time in proportion to their number.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, keys: Iterable[Hashable]) -> None:
        """Count `keys`.

        Raises:
            ValueError: too many keys have one hash.
            TypeError: one has none.
        """
        for key in keys:
            kind = type(key)
            if kind is str or kind is bytes:
                continue
            number = hash(key)
            count = self._counts[number] = self._counts.get(number, 0) + 1
            if count > _MAX_EQUAL_HASHES:
                raise ValueError("its keys collide, as if they were made to")


def check_hashes(keys: Sequence[Hashable]) -> None:
    """Refuse keys that were made to collide; see `HashCounts`.

    Raises:
        ValueError: too many of them have one hash.
        TypeError: one has none.
    """
    if len(keys) > _FEW:
        HashCounts().add(keys)
