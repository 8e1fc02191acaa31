"""The values that hold no others, each with its tag and its exact JSON form."""

from __future__ import annotations

import datetime
import math
import re
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.lib import format as npy
from torch.distributed.tensor import DTensor

from dist_ckpt.format.limits import count_elements
from dist_ckpt.state.layout import dtype_name, dtype_of

# numpy arrays as JSON: dtype, shape and bytes in C order, without pickle.


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
    return npy.descr_to_dtype(_checked_array(described, 0))


def _checked_array(described: Any, depth: int) -> Any:
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
    return (name, _checked_array(kind, depth), *map(tuple, shape))


def _lists(described: Any) -> Any:
    if isinstance(described, (list, tuple)):
        return [_lists(item) for item in described]
    return described


Refuse = Callable[[object, str], NoReturn]


@dataclass(frozen=True)
class Leaf:
    """How one type is written.

    Attributes:
        tag: its tag, unique.
        encode: (value, refuse) to (whether the JSON stands without a tag, JSON). It calls
            `refuse(value, reason)` for a value that has no exact form.
        decode: tagged JSON to value; raises whatever it likes for JSON it did not write.
    """

    tag: str
    encode: Callable[[Any, Refuse], tuple[bool, Any]]
    decode: Callable[[Any], Any]


def _int_to_json(value: int, refuse: Refuse) -> tuple[bool, Any]:
    # Beyond 64 bits in hex: decimal conversion is quadratic and Python caps its length.
    return (True, value) if -(1 << 63) <= value < 1 << 63 else (False, hex(value))


def _float_to_json(value: float, refuse: Refuse) -> tuple[bool, Any]:
    # JSON has no inf and nan; the eight bytes keep the sign and payload of a nan too.
    return (True, value) if math.isfinite(value) else (False, struct.pack(">d", value).hex())


def _str_to_json(value: str, refuse: Refuse) -> tuple[bool, Any]:
    return True, _checked(value, refuse)


def _checked(value: str, refuse: Refuse) -> str:
    if not value.isascii() and any(0xD800 <= ord(char) < 0xE000 for char in value):
        refuse(value, "it holds a lone surrogate, which has no UTF-8 form")
    return value


def checked_zone(value: datetime.datetime | datetime.time, refuse: Refuse) -> None:
    """Call `refuse` for a time whose zone is a rule and not an offset."""
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        refuse(value, "only a naive time or one with a fixed datetime.timezone is exact")


def _datetime_to_json(value: datetime.datetime, refuse: Refuse) -> tuple[bool, Any]:
    checked_zone(value, refuse)
    # isoformat leaves out which of two equal clock times at the end of summer time is meant.
    return False, [value.isoformat(), value.fold]


def _datetime_from_json(payload: Any) -> datetime.datetime:
    text, fold = payload
    return datetime.datetime.fromisoformat(text).replace(fold=fold)


def _timedelta_to_json(value: datetime.timedelta, refuse: Refuse) -> tuple[bool, Any]:
    return False, [value.days, value.seconds, value.microseconds]


def _scalar_to_json(value: np.generic, refuse: Refuse) -> tuple[bool, Any]:
    return False, array_to_json(np.asarray(value), refuse)


def tensor_to_json(value: torch.Tensor, refuse: Refuse) -> list[Any]:
    """Return dtype, shape and bytes of a plain tensor as JSON; its device is not kept."""
    # The bytes of one rank would be taken for the whole of it.
    if isinstance(value, DTensor):
        refuse(value, "a value of one rank alone cannot hold a tensor spread over ranks")
    # A conjugate is a lazy flag on the memory of another tensor: the bytes alone would lose it.
    flat = value.resolve_conj().resolve_neg().reshape(-1).contiguous().cpu()
    return [dtype_name(value.dtype), list(value.shape), _text(flat.view(torch.uint8).numpy())]


def tensor_from_json(payload: Any) -> torch.Tensor:
    """Return the tensor of `tensor_to_json`, on the CPU."""
    name, shape, text = payload
    dtype = dtype_of(name)
    data = b64decode(text, validate=True)
    count = count_elements(shape)  # whatever is claimed, nothing is allocated yet
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {count} elements of {name}")
    if not data:  # frombuffer refuses empty memory
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _text(data: Any) -> str:
    return b64encode(data).decode("ascii")


def _size(payload: Any) -> torch.Size:
    if not all(type(item) is int for item in payload):
        raise ValueError("a shape is made of integers")
    return torch.Size(payload)


_LEAVES: dict[type, Leaf] = {
    int: Leaf("int", _int_to_json, lambda text: int(text, 16)),
    float: Leaf("float", _float_to_json, lambda text: struct.unpack(">d", bytes.fromhex(text))[0]),
    str: Leaf("str", _str_to_json, str),
    bytes: Leaf(
        "bytes", lambda v, _: (False, _text(v)), lambda text: b64decode(text, validate=True)
    ),
    torch.dtype: Leaf("torch.dtype", lambda v, _: (False, dtype_name(v)), dtype_of),
    torch.Size: Leaf("torch.Size", lambda v, _: (False, list(v)), _size),
    torch.device: Leaf("torch.device", lambda v, _: (False, str(v)), torch.device),
    datetime.datetime: Leaf("datetime", _datetime_to_json, _datetime_from_json),
    datetime.date: Leaf("date", lambda v, _: (False, v.isoformat()), datetime.date.fromisoformat),
    datetime.timedelta: Leaf("timedelta", _timedelta_to_json, lambda p: datetime.timedelta(*p)),
    np.ndarray: Leaf(
        "np.ndarray", lambda v, refuse: (False, array_to_json(v, refuse)), array_from_json
    ),
    # As arrays these two would lose trailing zeros.
    np.str_: Leaf("np.str_", lambda v, refuse: (False, _checked("".join(v), refuse)), np.str_),
    np.bytes_: Leaf(
        "np.bytes_",
        lambda v, _: (False, _text(v)),
        lambda text: np.bytes_(b64decode(text, validate=True)),
    ),
}
_SCALAR = Leaf("np.generic", _scalar_to_json, lambda payload: array_from_json(payload)[()])
_INLINE = Leaf(
    "tensor_data", lambda v, refuse: (False, tensor_to_json(v, refuse)), tensor_from_json
)

BY_TAG: dict[str, Leaf] = {leaf.tag: leaf for leaf in (*_LEAVES.values(), _SCALAR, _INLINE)}


def leaf_of(kind: type) -> Leaf | None:
    """Return how values of exactly the type `kind` are written, or None if it is no leaf."""
    leaf = _LEAVES.get(kind)
    if leaf is None and issubclass(kind, np.generic):
        return _SCALAR
    return leaf
