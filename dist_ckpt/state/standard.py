"""Types of Python, numpy and torch that stand in a state out of the box, each taken apart in two.

A value is a head, which says what is special about it, and a body, which is walked as part of the
state: the items of a deque, the attributes of a namespace. Stored as `[head, body]` under a name
that begins with `RESERVED`, as if the user had registered the type: a reader that does not know
the name says which type it lacks.
"""

from __future__ import annotations

import array
import datetime
import io
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import EllipsisType, SimpleNamespace
from typing import Any, TypeVar
from uuid import UUID, SafeUUID

import numpy as np
import torch

from dist_ckpt.state.leaves import Refuse, checked_zone, dtype_from_json, dtype_to_json

RESERVED = "dist_ckpt:"
"""How the names of these types begin; no type of the user's may be registered under one."""


NAMEDTUPLE = "namedtuple"
"""What every namedtuple is stored as that is not registered."""

WRAPPED = "wrapped_tensor"
"""What a tensor is stored as that is several behind one face (`dist_ckpt.state.wrapped`)."""

ValueT = TypeVar("ValueT")


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
    checked_zone(value, refuse)
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


def _of(kind: type[ValueT], value: object) -> ValueT:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _number_code(code: object) -> Any:
    if code not in tuple(_NUMBERS):
        raise ValueError(f"no typecode of numbers: {code!r}")
    return code
