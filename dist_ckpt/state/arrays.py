"""numpy arrays as JSON: dtype, shape and bytes in C order, without pickle."""

from __future__ import annotations

import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

# What numpy itself writes for one plain dtype; its parser of longer strings is not for strangers.
_PLAIN = re.compile(r"[<>|=][a-zA-Z?][0-9]*(\[[0-9]*[a-zA-Z]+\])?")


def array_to_json(
    array: np.ndarray[Any, Any], refuse: Callable[[object, str], NoReturn]
) -> list[Any]:
    """Return `array` as JSON, or call `refuse(array, reason)` if its dtype has no exact form."""
    dtype = array.dtype
    described: Any = None
    try:
        # The round trip finds what numpy describes wrongly: dtypes of other packages come out as
        # plain bytes of the same size.
        described = npy.dtype_to_descr(dtype)
        exact = not dtype.hasobject and _dtype(described) == dtype
    except (ValueError, TypeError):
        exact = False
    if not exact:
        refuse(array, f"numpy dtype {dtype} cannot be stored without pickle")
    data = b64encode(array.tobytes(order="C")).decode("ascii")
    return [_lists(described), list(array.shape), data]


def array_from_json(payload: Any) -> np.ndarray[Any, Any]:
    """Return the array of `array_to_json`; it owns its memory and is writable.

    Raises:
        ValueError, TypeError: the JSON does not describe such an array.
    """
    described, shape, text = payload
    dtype = _dtype(described)
    if dtype.hasobject or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("not the dtype and shape of a plain array")
    data = b64decode(text, validate=True)
    # Compared as plain integers before numpy sees them: a shape may claim anything.
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    # Copied once more, because an array over a buffer cannot be resized by its owner.
    return np.ndarray(tuple(shape), dtype=dtype, buffer=bytearray(data)).copy()


def _dtype(described: Any) -> np.dtype[Any]:
    if isinstance(described, str):
        if not _PLAIN.fullmatch(described):
            raise ValueError(f"bad dtype {described!r}")
        return np.dtype(described)
    return npy.descr_to_dtype([_field(field) for field in described])


def _field(field: Any) -> tuple[Any, ...]:
    name, kind, *shape = field
    _dtype(kind)  # refuses what no plain dtype may be called, at every depth
    kind = kind if isinstance(kind, str) else [_field(inner) for inner in kind]
    return (tuple(name) if isinstance(name, list) else name, kind, *map(tuple, shape))


def _lists(described: Any) -> Any:
    if isinstance(described, (list, tuple)):
        return [_lists(item) for item in described]
    return described
