"""Arrays, scalars and dtypes of numpy in a pickle: found in what would have made them.

Nothing of numpy is called by a name of the stream. What is read are dtypes of a short list, and
arrays whose bytes the stream has, all of them and no more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown
from dist_ckpt.format.limits import INT64_MAX, count_elements

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


CONSTRUCTORS: Mapping[tuple[str, str], Constructor] = {
    # numpy has another name inside since its version 2.
    (f"numpy.{core}.{module}", name): Constructor(call)
    for core in ("core", "_core")
    for module, name, call in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer),
    )
}
KINDS: Mapping[tuple[str, str], Kind] = {
    ("numpy", "dtype"): _DTYPE,
    ("numpy", "ndarray"): _ARRAY,
}


def numpy_of(made: Made) -> Any:
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
