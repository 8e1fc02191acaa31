"""What stands for the plain values of a `torch.save` file, and for those that nobody can read."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from dist_ckpt.foreign import numpy_values
from dist_ckpt.foreign.numpy_values import numpy_of
from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown

BUFFER = Kind("_io.BytesIO")
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
            known[id(value)] = _buffer_of(value) if value.kind is BUFFER else numpy_of(value)
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
    **numpy_values.CONSTRUCTORS,
    ("torch", "Size"): Constructor(tuple),
    ("torch._utils", "_rebuild_parameter"): Constructor(_data),
    ("torch._utils", "_rebuild_parameter_with_state"): Constructor(_data),
}

KINDS: Mapping[tuple[str, str], Kind] = {("_io", "BytesIO"): BUFFER, **numpy_values.KINDS}
