"""What stands in a state out of the box: leaves, each with its tag, and what is taken apart.

A leaf is written at once, as its tag and its JSON. What is taken apart is a head, which says what
is special about the value, and a body, which is walked as part of the state: the items of a deque,
the attributes of a namespace. It is stored as `[head, body]` under a name that begins with
`RESERVED`, as if the user had registered the type: a reader that does not know the name says which
type it lacks.
"""

from __future__ import annotations

import array
import datetime
import io
import math
import re
import struct
from argparse import Namespace
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import EllipsisType, NoneType, SimpleNamespace
from typing import Any, NoReturn, TypeVar
from uuid import UUID, SafeUUID

import numpy as np
import torch
from numpy.lib import format as npy
from torch.distributed.tensor import DTensor

from dist_ckpt.format.names import count_elements
from dist_ckpt.state.layout import dtype_name, dtype_of

RESERVED = "dist_ckpt:"
"""How the names of these types begin; no type of the user's may be registered under one."""

NAMEDTUPLE = "namedtuple"
"""What every namedtuple is stored as that is not registered."""

WRAPPED = "wrapped_tensor"
"""What a tensor is stored as that is several behind one face (`dist_ckpt.state.layout`)."""

Refuse = Callable[[object, str], NoReturn]
"""Called with a value that has no exact form, and the reason; raises."""

_ValueT = TypeVar("_ValueT")


@dataclass(frozen=True, slots=True)
class Standard:
    """How one type is taken apart and put together again.

    Attributes:
        name: what it is stored as, after `RESERVED`.
        parts: (value, refuse) to (head, body); calls `refuse(value, reason)` for a value without
            an exact form. The head is made of plain values.
        build: (head, body) to an equal value; raises whatever it likes for what it did not write.
    """

    name: str
    parts: Callable[[Any, Refuse], tuple[object, object]]
    build: Callable[[Any, Any], Any]


def _deque_parts(value: deque[Any], refuse: Refuse) -> tuple[object, object]:
    return value.maxlen, list(value)


def _deque(maxlen: int | None, items: list[Any]) -> deque[Any]:
    if maxlen is not None and len(items) > maxlen:
        raise ValueError(f"{len(items)} items in a deque of at most {maxlen}")
    return deque(items, maxlen)


# A factory is code. These few are known by a name of ours: none is looked up anywhere else.
_FACTORIES: dict[str, Callable[[], object]] = {
    kind.__name__: kind
    for kind in (
        bool,
        bytearray,
        bytes,
        complex,
        dict,
        float,
        frozenset,
        int,
        list,
        set,
        str,
        tuple,
        Counter,
        OrderedDict,
        deque,
    )
}
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}


def _defaultdict_parts(value: defaultdict[Any, Any], refuse: Refuse) -> tuple[object, object]:
    factory = value.default_factory
    if factory is None:
        return None, dict(value)
    # By identity of the class itself: what is equal to it may be anything.
    if not isinstance(factory, type) or factory not in _FACTORY_NAMES:
        refuse(
            value,
            f"its factory {factory!r} is code, which no checkpoint holds: use one of "
            f"{', '.join(_FACTORIES)}, or keep dict(...) of it",
        )
    return _FACTORY_NAMES[factory], dict(value)


def _defaultdict(factory: str | None, items: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(None if factory is None else _FACTORIES[factory], _of(dict, items))


def _bytes_io(position: int, data: bytes) -> io.BytesIO:
    stream = io.BytesIO(_of(bytes, data))
    stream.seek(position)
    return stream


# Whose items are numbers of a size that `itemsize` tells; those of "u" are characters.
_NUMBERS = "bBhHiIlLqQfd"


def _array_parts(value: array.array[Any], refuse: Refuse) -> tuple[object, object]:
    if value.typecode not in _NUMBERS:
        refuse(value, f"an array of typecode {value.typecode!r} has no portable form: use a str")
    return [value.typecode, value.itemsize], value.tobytes()


def _array(head: list[Any], data: bytes) -> array.array[Any]:
    typecode, itemsize = head
    built: array.array[Any] = array.array(_number_code(typecode))
    if built.itemsize != itemsize:
        raise ValueError(
            f"items of {typecode!r} have {itemsize} bytes there, {built.itemsize} here"
        )
    built.frombytes(_of(bytes, data))
    return built


def _time_parts(value: datetime.time, refuse: Refuse) -> tuple[object, object]:
    _checked_zone(value, refuse)
    return value.fold, value.isoformat()


def _zone(offset: datetime.timedelta, name: str | None) -> datetime.timezone:
    return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)


def _zone_parts(value: datetime.timezone, refuse: Refuse) -> tuple[object, object]:
    offset = value.utcoffset(None)
    # Only a name that the offset does not give by itself was given.
    name = value.tzname(None)
    return offset, None if name == datetime.timezone(offset).tzname(None) else name


def _decimal(head: None, text: str) -> Decimal:
    # A text of ours only: Decimal takes tuples and floats, too.
    return Decimal(_of(str, text))


def _fraction(head: None, pair: list[int]) -> Fraction:
    numerator, denominator = pair
    return Fraction(_of(int, numerator), _of(int, denominator))


def _complex(head: None, pair: list[float]) -> complex:
    real, imag = pair
    return complex(_of(float, real), _of(float, imag))


def _namespace(kind: type) -> Callable[[Any, Any], Any]:
    def build(head: None, attributes: dict[str, Any]) -> Any:
        built = kind()
        # Into its dict and not by setattr: a name such as __class__ is then only a name.
        vars(built).update(_of(dict, attributes))
        return built

    return build


def _path(kind: type[PurePath]) -> Callable[[Any, Any], Any]:
    return lambda head, text: kind(_of(str, text))


def _range(kind: type) -> Callable[[Any, Any], Any]:
    def build(head: None, bounds: list[Any]) -> Any:
        start, stop, step = bounds
        return kind(start, stop, step)

    return build


def _text(value: object, refuse: Refuse) -> tuple[object, object]:
    return None, str(value)


def _bounds(value: range | slice, refuse: Refuse) -> tuple[object, object]:
    return None, [value.start, value.stop, value.step]


def _attributes(value: object, refuse: Refuse) -> tuple[object, object]:
    return None, vars(value)


# What torch has a fixed set of, by the text that torch shows for it.
_CONSTANTS: dict[str, object] = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.layout | torch.memory_format)
}

_STANDARD: dict[type, Standard] = {
    deque: Standard("deque", _deque_parts, _deque),
    defaultdict: Standard("defaultdict", _defaultdict_parts, _defaultdict),
    Namespace: Standard("namespace", _attributes, _namespace(Namespace)),
    SimpleNamespace: Standard("simple_namespace", _attributes, _namespace(SimpleNamespace)),
    # Of the flavour of this host, under one name: a run may move between hosts.
    type(Path()): Standard("path", _text, _path(Path)),
    PurePosixPath: Standard("pure_posix_path", _text, _path(PurePosixPath)),
    PureWindowsPath: Standard("pure_windows_path", _text, _path(PureWindowsPath)),
    complex: Standard("complex", lambda v, _: (None, [v.real, v.imag]), _complex),
    range: Standard("range", _bounds, _range(range)),
    slice: Standard("slice", _bounds, _range(slice)),
    EllipsisType: Standard("ellipsis", lambda v, _: (None, None), lambda head, body: ...),
    bytearray: Standard(
        "bytearray", lambda v, _: (None, bytes(v)), lambda _, data: bytearray(_of(bytes, data))
    ),
    io.BytesIO: Standard("bytes_io", lambda v, _: (v.tell(), v.getvalue()), _bytes_io),
    array.array: Standard("array", _array_parts, _array),
    Decimal: Standard("decimal", _text, _decimal),
    Fraction: Standard("fraction", lambda v, _: (None, [v.numerator, v.denominator]), _fraction),
    UUID: Standard(
        "uuid",
        lambda v, _: (v.is_safe.value, v.hex),
        lambda safe, text: UUID(hex=text, is_safe=SafeUUID(safe)),
    ),
    datetime.time: Standard(
        "time",
        _time_parts,
        lambda fold, text: datetime.time.fromisoformat(text).replace(fold=fold),
    ),
    datetime.timezone: Standard("timezone", _zone_parts, _zone),
    torch.layout: Standard("torch.layout", _text, lambda _, text: _CONSTANTS[text]),
    torch.memory_format: Standard("torch.memory_format", _text, lambda _, text: _CONSTANTS[text]),
}
_DTYPE = Standard(
    "np.dtype",
    lambda value, refuse: (None, dtype_to_json(value, value, refuse)),
    lambda _, described: dtype_from_json(described),
)

STANDARD_BY_NAME: dict[str, Standard] = {each.name: each for each in (*_STANDARD.values(), _DTYPE)}


def standard_of(kind: type) -> Standard | None:
    """Return how values of exactly the type `kind` are taken apart, None for a type not of here."""
    found = _STANDARD.get(kind)
    # numpy makes a class for each dtype; it has a fixed set of them.
    return _DTYPE if found is None and issubclass(kind, np.dtype) else found


def _of(kind: type[_ValueT], value: object) -> _ValueT:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _number_code(code: object) -> Any:
    if code not in tuple(_NUMBERS):
        raise ValueError(f"no typecode of numbers: {code!r}")
    return code


# numpy arrays as JSON: dtype, shape and bytes in C order, without pickle.


# What numpy itself writes for one plain dtype; its parser of longer strings is not for strangers.
_PLAIN = re.compile(r"[<>|=][a-zA-Z?][0-9]{0,9}(\[[0-9]{0,9}[a-zA-Z]+\])?")
_MAX_DEPTH = 16
# An array without an element takes memory for one of them all the same.
_MAX_ITEM_BYTES = 1 << 20
_PLAIN_ARRAYS = "make it a list (.tolist()), or an array of numbers or of text (.astype)"


def _array_to_json(array: np.ndarray[Any, Any], refuse: Refuse) -> list[Any]:
    """Return `array` as JSON, or call `refuse(array, reason)` if its dtype has no exact form."""
    described = dtype_to_json(array.dtype, array, refuse)
    if not array.size and array.dtype.itemsize > _MAX_ITEM_BYTES:
        refuse(array, f"an element of its dtype takes more than {_MAX_ITEM_BYTES} bytes")
    data = b64encode(array.tobytes(order="C")).decode("ascii")
    return [described, list(array.shape), data]


def dtype_to_json(dtype: np.dtype[Any], value: object, refuse: Refuse) -> Any:
    """Return `dtype` as JSON, or call `refuse(value, reason)` if it has no exact form."""
    if dtype.hasobject:
        refuse(value, f"numpy dtype {dtype} cannot be stored without pickle: {_PLAIN_ARRAYS}")
    described: Any = None
    try:
        # The round trip finds what numpy describes wrongly: dtypes of other packages come out as
        # plain bytes of the same size.
        described = npy.dtype_to_descr(dtype)
        exact = bool(_dtype(described) == dtype)
    except (ValueError, TypeError):
        exact = False
    if not exact:
        refuse(value, f"numpy dtype {dtype} cannot be stored without pickle: {_PLAIN_ARRAYS}")
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


def _array_from_json(payload: Any) -> np.ndarray[Any, Any]:
    """Return the array of `_array_to_json`; it owns its memory and is writable.

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
    return npy.descr_to_dtype(_as_numpy_has_it(described, 0))


def _as_numpy_has_it(described: Any, depth: int) -> Any:
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
    return (name, _as_numpy_has_it(kind, depth), *map(tuple, shape))


def _lists(described: Any) -> Any:
    if isinstance(described, (list, tuple)):
        return [_lists(item) for item in described]
    return described


# The values that hold no others, each with its tag and its exact JSON form.


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
    return True, _checked_text(value, refuse)


def _checked_text(value: str, refuse: Refuse) -> str:
    if not value.isascii() and any(0xD800 <= ord(char) < 0xE000 for char in value):
        refuse(value, "it holds a lone surrogate, which has no UTF-8 form")
    return value


def _checked_zone(value: datetime.datetime | datetime.time, refuse: Refuse) -> None:
    """Call `refuse` for a time whose zone is a rule and not an offset."""
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        refuse(value, "only a naive time or one with a fixed datetime.timezone is exact")


def _datetime_to_json(value: datetime.datetime, refuse: Refuse) -> tuple[bool, Any]:
    _checked_zone(value, refuse)
    # isoformat leaves out which of two equal clock times at the end of summer time is meant.
    return False, [value.isoformat(), value.fold]


def _datetime_from_json(payload: Any) -> datetime.datetime:
    text, fold = payload
    return datetime.datetime.fromisoformat(text).replace(fold=fold)


def _timedelta_to_json(value: datetime.timedelta, refuse: Refuse) -> tuple[bool, Any]:
    return False, [value.days, value.seconds, value.microseconds]


def _scalar_to_json(value: np.generic, refuse: Refuse) -> tuple[bool, Any]:
    return False, _array_to_json(np.asarray(value), refuse)


def tensor_to_json(value: torch.Tensor, refuse: Refuse) -> list[Any]:
    """Return dtype, shape and bytes of a plain tensor as JSON; its device is not kept."""
    # The bytes of one rank would be taken for the whole of it.
    if isinstance(value, DTensor):
        refuse(value, "a value of one rank alone cannot hold a tensor spread over ranks")
    # A conjugate is a lazy flag on the memory of another tensor: the bytes alone would lose it.
    flat = value.resolve_conj().resolve_neg().reshape(-1).contiguous().cpu()
    return [dtype_name(value.dtype), list(value.shape), _base64(flat.view(torch.uint8).numpy())]


def _tensor_from_json(payload: Any) -> torch.Tensor:
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


def _base64(data: Any) -> str:
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
        "bytes", lambda v, _: (False, _base64(v)), lambda text: b64decode(text, validate=True)
    ),
    torch.dtype: Leaf("torch.dtype", lambda v, _: (False, dtype_name(v)), dtype_of),
    torch.Size: Leaf("torch.Size", lambda v, _: (False, list(v)), _size),
    torch.device: Leaf("torch.device", lambda v, _: (False, str(v)), torch.device),
    datetime.datetime: Leaf("datetime", _datetime_to_json, _datetime_from_json),
    datetime.date: Leaf("date", lambda v, _: (False, v.isoformat()), datetime.date.fromisoformat),
    datetime.timedelta: Leaf("timedelta", _timedelta_to_json, lambda p: datetime.timedelta(*p)),
    np.ndarray: Leaf(
        "np.ndarray", lambda v, refuse: (False, _array_to_json(v, refuse)), _array_from_json
    ),
    # As arrays these two would lose trailing zeros.
    np.str_: Leaf("np.str_", lambda v, refuse: (False, _checked_text("".join(v), refuse)), np.str_),
    np.bytes_: Leaf(
        "np.bytes_",
        lambda v, _: (False, _base64(v)),
        lambda text: np.bytes_(b64decode(text, validate=True)),
    ),
}
_SCALAR = Leaf("np.generic", _scalar_to_json, lambda payload: _array_from_json(payload)[()])
# Those of numpy itself alone: what inherits of one would come back as that, as `np.record` would.
_SCALARS = frozenset(np.sctypeDict.values())
_INLINE = Leaf(
    "tensor_data", lambda v, refuse: (False, tensor_to_json(v, refuse)), _tensor_from_json
)

BY_TAG: dict[str, Leaf] = {leaf.tag: leaf for leaf in (*_LEAVES.values(), _SCALAR, _INLINE)}


PAIRS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict", Counter: "counter"}
SETS: dict[type, str] = {set: "set", frozenset: "frozenset"}


def is_written_as_such(kind: type) -> bool:
    """Tell whether values of the type `kind` are written in a way that nobody can register over."""
    own = (NoneType, bool, list, tuple, *PAIRS, *SETS)
    return kind in own or leaf_of(kind) is not None or issubclass(kind, torch.Tensor)


def leaf_of(kind: type) -> Leaf | None:
    """Return how values of exactly the type `kind` are written, or None if it is no leaf."""
    return _LEAVES.get(kind) or (_SCALAR if kind in _SCALARS else None)
