"""What stands for the plain values of a `torch.save` file, arrays included.

Nothing of numpy is called by a name of the stream. What is read are dtypes of a short list, and
arrays whose bytes the stream has, all of them and no more.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown
from dist_ckpt.format.names import INT64_MAX, count_elements

_BUFFER = Kind("_io.BytesIO")
_NAME_SHOWN = 200


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Stands for a device."""

    kind: str
    index: int | None = None


def what_of(unknown: Unknown) -> str:
    """Say in a line why a value cannot be read."""
    # The name is chosen by whoever wrote the file: it may be long, or move the cursor.
    name = "".join(c if c.isprintable() else "?" for c in unknown.name[:_NAME_SHOWN])
    return f"it refers to {name}, which is neither a tensor nor a plain value"


def unknown_in(value: Any) -> Unknown | None:
    """Return the first `Unknown` in `value`; what it looks at was bounded when it was read."""
    if isinstance(value, Unknown):
        return value
    if type(value) is Made:  # what could not be completed
        return Unknown(value.kind.name)
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = (*value, *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    return next((found for item in inner if (found := unknown_in(item)) is not None), None)


def completed(value: Any) -> Any:
    """Return `value` with a `BytesIO`, an array or a dtype in the place of what makes one up."""
    return _completed(value, {})


def _completed(value: Any, known: dict[int, Any]) -> Any:
    if type(value) is Made:
        # Once for each: what is shared in the stream takes memory once, too.
        if id(value) not in known:
            known[id(value)] = _buffer_of(value) if value.kind is _BUFFER else _numpy_of(value)
        return known[id(value)]
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            value[key] = _completed(item, known)
    elif type(value) is list:
        value[:] = [_completed(item, known) for item in value]
    elif type(value) is tuple:
        return tuple(_completed(item, known) for item in value)
    return value


def _buffer_of(made: Made) -> Any:
    state = made.state
    if type(state) is not tuple or len(state) < 2 or type(state[0]) is not bytes:
        return made
    buffer = BytesIO(state[0])
    buffer.seek(state[1] if type(state[1]) is int and 0 <= state[1] <= len(state[0]) else 0)
    return buffer


def _bytes_of(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 writes as text, one character for each."""
    if encoding != "latin1":
        raise ValueError(f"it has bytes encoded as {encoding}")
    return text.encode(encoding)


def _device(kind: Any, index: Any = None) -> DeviceName:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise ValueError("it has a device that cannot be")
    return DeviceName(kind, index)


def _ordered() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _plain_bytes(data: Any = b"") -> bytes:
    # Of a number, `bytes` makes as many zeros.
    if type(data) is not bytes:
        raise ValueError("it has bytes that are made of something else")
    return data


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("it has a complex number of something else than floats")
    return complex(real, imaginary)


def _counter(counts: Any = None) -> Counter[Any]:
    made: Counter[Any] = Counter()
    # Not by its own `update`, which adds up.
    dict.update(made, counts or {})
    return made


def _data(data: Any, *_: Any) -> Any:
    return data


# Of numpy: arrays, their dtypes, and single numbers.


_DTYPE, _ARRAY = Kind("numpy.dtype"), Kind("numpy.ndarray")

# Numbers and truth values, and text and bytes of a fixed length. No `longdouble`, whose bytes mean
# something else on another machine, and nothing that has fields or Python objects.
_CODE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,4}")
_MAX_NDIM = 32  # of the oldest numpy


def _reconstruct(kind: Any, *_: Any) -> Made | Unknown:
    """Begin an array: shape, dtype and bytes come with its state."""
    # A subclass has more to it than its elements.
    return Made(_ARRAY, ()) if kind is _ARRAY else Unknown("numpy.ndarray of another class")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Made | Unknown:
    if order not in ("C", "F"):
        return Unknown("a numpy array of another order")
    return Made(_ARRAY, (), (1, shape, dtype, order == "F", data))


def _scalar(dtype: Any, data: Any) -> Any:
    """Return a numpy scalar."""
    found = _dtype_of(dtype)
    if found is None:
        return Unknown(f"a numpy scalar of {_shown(dtype)}")
    # Of exactly the bytes of one element.
    if type(data) is not bytes or len(data) != found.itemsize:
        return Unknown("a numpy scalar of other bytes")
    return np.frombuffer(data, found)[0]


_NUMPY_CONSTRUCTORS: Mapping[tuple[str, str], Constructor] = {
    # numpy has another name inside since its version 2.
    (f"numpy.{core}.{module}", name): Constructor(call)
    for core in ("core", "_core")
    for module, name, call in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer),
    )
}
_NUMPY_KINDS: Mapping[tuple[str, str], Kind] = {
    ("numpy", "dtype"): _DTYPE,
    ("numpy", "ndarray"): _ARRAY,
}


def _numpy_of(made: Made) -> Any:
    """Return the array or dtype that `made` stands for, an `Unknown` for one that is not read.

    What is neither comes back as it is.
    """
    if made.kind is _DTYPE:
        dtype = _dtype_of(made)
        return Unknown(_shown(made)) if dtype is None else dtype
    if made.kind is _ARRAY:
        return _array_of(made.state)
    return made


def _array_of(state: Any) -> Any:
    """Return an array with memory of its own; of (version, shape, dtype, order, bytes)."""
    if type(state) is not tuple or len(state) != 5:
        return Unknown("a numpy.ndarray without content")
    _, shape, described, by_columns, data = state
    dtype = _dtype_of(described)
    if dtype is None:
        return Unknown(f"a numpy.ndarray of {_shown(described)}")
    if type(shape) is not tuple or type(data) not in (bytes, bytearray):
        return Unknown("a numpy.ndarray of something else than bytes")
    # In Python integers, before numpy sees them: a shape may claim anything.
    if count_elements(shape) * dtype.itemsize != len(data) or not _has_extent(shape, dtype):
        raise ValueError("it has an array whose bytes are not those of its shape")
    # Copied, because memory of `bytes` must never be written.
    return np.ndarray(shape, dtype, data, order="F" if by_columns else "C").copy(order="K")


def _shown(made: Any) -> str:
    if type(made) is not Made or made.kind is not _DTYPE or not made.arguments:
        return "numpy.dtype"
    code = made.arguments[0]
    return f"numpy.dtype {code!r}" if type(code) is str else "numpy.dtype"


def _has_extent(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Tell whether numpy has arrays of `shape`, be there elements in this one or not."""
    taken = math.prod(size for size in shape if size) * dtype.itemsize
    return len(shape) <= _MAX_NDIM and taken <= INT64_MAX


def _dtype_of(made: Any) -> np.dtype[Any] | None:
    """Return the dtype that is made with a code and then given a state with its order of bytes."""
    if type(made) is not Made or made.kind is not _DTYPE or not made.arguments:
        return None
    code, state = made.arguments[0], made.state
    if type(code) is not str or not _CODE.fullmatch(code):
        return None
    # Of (version, order, subdtype, names, fields, itemsize, alignment, flags) the three in the
    # middle are those of arrays in arrays and of records.
    if type(state) is not tuple or len(state) < 5 or state[2:5] != (None, None, None):
        return None
    order = state[1]
    if type(order) is not str or order not in ("<", ">", "|"):
        return None
    return np.dtype(order + code)


# By pairs that are spelled out: no name is looked up anywhere.
CONSTRUCTORS: Mapping[tuple[str, str], Constructor] = {
    ("collections", "OrderedDict"): Constructor(_ordered),
    ("collections", "Counter"): Constructor(_counter),
    ("__builtin__", "set"): Constructor(set, hashes=True),
    ("__builtin__", "frozenset"): Constructor(frozenset, hashes=True),
    ("__builtin__", "bytes"): Constructor(_plain_bytes),
    ("__builtin__", "bytearray"): Constructor(lambda data=b"": bytearray(_plain_bytes(data))),
    ("__builtin__", "complex"): Constructor(_complex),
    ("_codecs", "encode"): Constructor(_bytes_of),
    ("torch", "device"): Constructor(_device),
    **_NUMPY_CONSTRUCTORS,
    ("torch", "Size"): Constructor(tuple),
    ("torch._utils", "_rebuild_parameter"): Constructor(_data),
    ("torch._utils", "_rebuild_parameter_with_state"): Constructor(_data),
}

KINDS: Mapping[tuple[str, str], Kind] = {("_io", "BytesIO"): _BUFFER, **_NUMPY_KINDS}
