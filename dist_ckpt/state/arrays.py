"""numpy arrays as JSON: dtype, shape and bytes in C order, without pickle."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from dist_ckpt.format.limits import count_elements

# What numpy itself writes for one plain dtype; its parser of longer strings is not for strangers.
_PLAIN = re.compile(r"[<>|=][a-zA-Z?][0-9]{0,9}(\[[0-9]{0,9}[a-zA-Z]+\])?")
_MAX_DEPTH = 16
# An array without an element takes memory for one of them all the same.
_MAX_ITEM_BYTES = 1 << 20


def array_to_json(
    array: np.ndarray[Any, Any], refuse: Callable[[object, str], NoReturn]
) -> list[Any]:
    """Return `array` as JSON, or call `refuse(array, reason)` if its dtype has no exact form."""
    described = dtype_to_json(array.dtype, array, refuse)
    if not array.size and array.dtype.itemsize > _MAX_ITEM_BYTES:
        refuse(array, f"an element of its dtype takes more than {_MAX_ITEM_BYTES} bytes")
    data = b64encode(array.tobytes(order="C")).decode("ascii")
    return [described, list(array.shape), data]


def dtype_to_json(
    dtype: np.dtype[Any], value: object, refuse: Callable[[object, str], NoReturn]
) -> Any:
    """Return `dtype` as JSON, or call `refuse(value, reason)` if it has no exact form."""
    described: Any = None
    try:
        # The round trip finds what numpy describes wrongly: dtypes of other packages come out as
        # plain bytes of the same size.
        described = npy.dtype_to_descr(dtype)
        exact = not dtype.hasobject and _dtype(described) == dtype
    except (ValueError, TypeError):
        exact = False
    if not exact:
        refuse(value, f"numpy dtype {dtype} cannot be stored without pickle")
    return _lists(described)


def dtype_from_json(described: Any) -> np.dtype[Any]:
    """Return the dtype of `dtype_to_json`.

    Raises:
        ValueError, TypeError: the JSON does not describe one of plain values.
    """
    dtype = _dtype(described)
    if dtype.hasobject:
        raise ValueError("a dtype of Python objects")
    return dtype


def array_from_json(payload: Any) -> np.ndarray[Any, Any]:
    """Return the array of `array_to_json`; it owns its memory and is writable.

    Raises:
        ValueError, TypeError: the JSON does not describe such an array.
    """
    described, shape, text = payload
    count = count_elements(shape)
    dtype = _dtype(described)
    data = b64decode(text, validate=True)
    if dtype.hasobject or (dtype.itemsize > _MAX_ITEM_BYTES and not data):
        raise ValueError("not the dtype of a plain array")
    # Compared as plain integers before numpy sees them: a shape may claim anything.
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    # Copied once more, because an array over a buffer cannot be resized by its owner.
    return np.ndarray(tuple(shape), dtype=dtype, buffer=bytearray(data)).copy()


def _dtype(described: Any) -> np.dtype[Any]:
    return npy.descr_to_dtype(_checked(described, 0))


def _checked(described: Any, depth: int) -> Any:
    """Return a description as numpy takes it; each part of it is looked at once."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"a dtype nests more than {_MAX_DEPTH} deep")
    if isinstance(described, str):
        # What no plain dtype may be called is refused at every depth.
        if not _PLAIN.fullmatch(described):
            raise ValueError(f"bad dtype {described!r}")
        return described
    return [_field(field, depth + 1) for field in described]


def _field(field: Any, depth: int) -> tuple[Any, ...]:
    name, kind, *shape = field
    for sizes in shape:
        count_elements(sizes)
    name = tuple(name) if isinstance(name, list) else name
    return (name, _checked(kind, depth), *map(tuple, shape))


def _lists(described: Any) -> Any:
    if isinstance(described, (list, tuple)):
        return [_lists(item) for item in described]
    return described
