"""Types of the user's own that may stand in a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from dist_ckpt.errors import UsageError


@dataclass(frozen=True)
class Registered:
    """One registered type: its stored name and the two functions of it."""

    type: type
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], Any]


class Registry:
    """Registered types, by type and by stored name."""

    def __init__(self) -> None:
        self._types: dict[type, Registered] = {}
        self._names: dict[str, Registered] = {}

    def add(self, entry: Registered) -> None:
        """Add `entry`, or let it take the place of the same class defined anew.

        Raises:
            UsageError: another class has the name, or the class has another name.
        """
        known = self._names.get(entry.name)
        if known is not None and _label(known.type) != _label(entry.type):
            raise UsageError(
                f"the name {entry.name!r} stands for {_label(known.type)}: "
                f"register {_label(entry.type)} under another one"
            )
        named = self._types.get(entry.type)
        if named is not None and named.name != entry.name:
            raise UsageError(f"{_label(entry.type)} is registered as {named.name!r} already")
        # A notebook runs its class statement again: the old class cannot be decoded to any more.
        if known is not None:
            del self._types[known.type]
        self._names[entry.name] = self._types[entry.type] = entry

    def by_type(self, kind: type) -> Registered | None:
        """Return the entry of exactly the class `kind`."""
        return self._types.get(kind)

    def by_name(self, name: str) -> Registered | None:
        """Return the entry stored as `name`."""
        return self._names.get(name)


def _label(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


REGISTRY = Registry()


def register(
    type_: type,
    *,
    name: str,
    encode: Callable[[Any], object] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> None:
    """Let values of exactly the class `type_` stand in a state.

    Args:
        type_: the class. Subclasses are other types.
        name: what checkpoints call it, for ever; the class itself may move or be renamed.
        encode: value to something made of supported types. An enum needs none: its value.
        decode: what `encode` returned to an equal value. An enum needs none: the class.

    Raises:
        UsageError: a bad or taken name, or no functions for a class that is no enum.
    """
    if not name or not name.isprintable():
        raise UsageError(f"bad name {name!r} for {_label(type_)}: must be printable text")
    # Nothing is guessed, not even from __reduce__: what is stored is what `encode` says.
    if not issubclass(type_, Enum) and (encode is None or decode is None):
        raise UsageError(f"{_label(type_)} is no enum: register it with encode= and decode=")
    REGISTRY.add(Registered(type_, name, encode or attrgetter("value"), decode or type_))
