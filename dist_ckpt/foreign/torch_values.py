"""What stands for the plain values of a `torch.save` file, and for those that nobody can read."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown

BUFFER = Kind("_io.BytesIO")
_NAME_SHOWN = 200
_NUMPY_CODES = frozenset(
    ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
)


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
    if type(value) is Made:  # alone it is no value: the dtype of a numpy scalar
        return Unknown(value.kind.name)
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = (*value, *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    return next((found for item in inner if (found := unknown_in(item)) is not None), None)


def with_buffers(value: Any) -> Any:
    """Return `value` with a `BytesIO` in the place of each that is still what it is made of."""
    if type(value) is Made and value.kind is BUFFER:
        state = value.state
        if type(state) is tuple and len(state) > 1 and type(state[0]) is bytes:
            buffer = BytesIO(state[0])
            buffer.seek(state[1] if type(state[1]) is int and 0 <= state[1] <= len(state[0]) else 0)
            return buffer
    elif type(value) in (dict, OrderedDict):
        for key, item in value.items():
            value[key] = with_buffers(item)
    elif type(value) is list:
        value[:] = map(with_buffers, value)
    elif type(value) is tuple:
        return tuple(map(with_buffers, value))
    return value


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


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    """Return a numpy scalar; `dtype` is made with a code, and then given a state."""
    code = dtype.arguments[0] if isinstance(dtype, Made) and dtype.arguments else None
    order = dtype.state[1] if code is not None and type(dtype.state) is tuple else None
    if isinstance(dtype, Unknown) or type(code) is not str or code not in _NUMPY_CODES:
        return Unknown("a numpy scalar of another dtype")
    found = np.dtype(code)
    # Of exactly the bytes of one element, and in the order of bytes of this machine.
    if order not in ("<", "|") or type(data) is not bytes or len(data) != found.itemsize:
        return Unknown("a numpy scalar of other bytes")
    return np.frombuffer(data, found)[0]


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
    ("numpy.core.multiarray", "scalar"): Constructor(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Constructor(_numpy_scalar),
    ("torch", "Size"): Constructor(tuple),
    ("torch._utils", "_rebuild_parameter"): Constructor(_data),
    ("torch._utils", "_rebuild_parameter_with_state"): Constructor(_data),
}
