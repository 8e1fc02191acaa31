"""Pickles of the few things that torch and its checkpoints describe, one operation at a time.

What is written names classes and functions, and imports or calls none of them here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Name:
    """Whatever a module calls `name`."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What `function` returns for `arguments`."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """An object of `cls` that is made without arguments and given `state`."""

    cls: Name
    state: Any


@dataclass(frozen=True, slots=True)
class Outside:
    """What the reader is to find outside of the pickle, by `key`."""

    key: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are described here, as its pairs."""

    pairs: tuple[tuple[Any, Any], ...]


def pickled(value: Any) -> bytes:
    """Return the pickle of `value`, by protocol 2, in which torch writes its own.

    Args:
        value: of None, bools, integers, text, tuples, lists, dicts, and what is above.

    Raises:
        TypeError: anything else is in it.
    """
    # No memo: what stands here twice is written twice, and nothing refers back.
    return b"".join((b"\x80\x02", *_operations(value), b"."))


def _operations(value: Any) -> list[bytes]:
    found: list[bytes] = []
    _add(value, found.append)
    return found


def _add(value: Any, add: Any) -> None:
    match value:
        case None:
            add(b"N")
        # In front of int, of which a bool is one.
        case bool():
            add(b"\x88" if value else b"\x89")
        case int():
            add(_integer(value))
        case str():
            # As pickle encodes it: a name may hold half a character.
            text = value.encode("utf-8", "surrogatepass")
            add(b"X" + struct.pack("<I", len(text)) + text)
        case tuple():
            _add_all((_MARK, *value, _Raw(b"t")), add)
        case list():
            _add_all((_Raw(b"]("), *value, _Raw(b"e")), add)
        case dict():
            _add(Pairs(tuple(value.items())), add)
        case Pairs():
            _add_all((_Raw(b"}("), *(each for pair in value.pairs for each in pair)), add)
            add(b"u")
        case Name():
            # GLOBAL, the way of protocol 2: the reader imports it, or has a list of what it may.
            add(f"c{value.module}\n{value.name}\n".encode())
        case Call():
            _add_all((value.function, value.arguments, _Raw(b"R")), add)
        case Built():
            _add_all((value.cls, _Raw(b")\x81"), value.state, _Raw(b"b")), add)
        case Outside():
            # BINPERSID: `torch.load` is given the key, and finds the memory in another record.
            _add_all((value.key, _Raw(b"Q")), add)
        case _Raw():
            add(value.code)
        case _:
            raise TypeError(f"a {type(value).__name__} is not written to pickles")


@dataclass(frozen=True, slots=True)
class _Raw:
    code: bytes


_MARK = _Raw(b"(")


def _add_all(values: Sequence[Any], add: Any) -> None:
    for value in values:
        _add(value, add)


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    # One bit more than the number has: the highest says the sign.
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    # LONG1 has one byte for the length, which is plenty for sizes and offsets.
    return b"\x8a" + bytes([len(data)]) + data
