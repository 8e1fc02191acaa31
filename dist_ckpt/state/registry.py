"""Types of the user's own that may stand in a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

import numpy as np

from dist_ckpt.errors import UsageError
from dist_ckpt.state.standard import RESERVED, is_written_as_such


@dataclass(frozen=True)
class Registered:
    """One registered type: its stored name and the two functions of it.

    Attributes:
        type: the class.
        name: what checkpoints call it.
        encode: value to something made of supported types.
        decode: and back.
        given: those of the two that were given; the others follow from the class.
    """

    type: type
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], Any]
    given: tuple[Callable[[Any], object] | None, Callable[[Any], Any] | None] = (None, None)


class Registry:
    """Registered types.

    Attributes:
        types: by type.
        names: by stored name.
    """

    def __init__(self) -> None:
        self.types: dict[type, Registered] = {}
        self.names: dict[str, Registered] = {}
        self._namedtuples: dict[tuple[str, tuple[str, ...]], type] = {}

    def add(self, entry: Registered) -> None:
        """Add `entry`, or let it take the place of the same class defined anew.

        Raises:
            UsageError: another class has the name, or the class has another name.
        """
        known = self.names.get(entry.name)
        if known is not None and _label(known.type) != _label(entry.type):
            raise UsageError(
                f"the name {entry.name!r} stands for {_label(known.type)}: "
                f"register {_label(entry.type)} under another one"
            )
        named = self.types.get(entry.type)
        if named is not None and named.name != entry.name:
            raise UsageError(f"{_label(entry.type)} is registered as {named.name!r} already")
        # A notebook runs its class statement again: the old class cannot be decoded to any more.
        if known is not None:
            del self.types[known.type]
        self.names[entry.name] = self.types[entry.type] = entry

    def by_type(self, kind: type) -> Registered | None:
        """Return the entry of exactly the class `kind`."""
        return self.types.get(kind)

    def by_name(self, name: str) -> Registered | None:
        """Return the entry stored as `name`."""
        return self.names.get(name)

    def entries(self) -> list[Registered]:
        """Return all entries, in the order in which they were registered."""
        return list(self.names.values())

    def learn(self, kind: type) -> type:
        """Note a namedtuple class that a state holds; return the one of its name and fields.

        That is another class only where two of different origin are called alike.
        """
        key = (kind.__name__, kind._fields)  # type: ignore[attr-defined]
        known = self._namedtuples.get(key)
        if known is None or _label(known) == _label(kind):
            self._namedtuples[key] = known = kind
        return known

    def namedtuple(self, name: str, fields: tuple[str, ...]) -> Any:
        """Return the namedtuple class of that name and those fields that was learnt, or None."""
        return self._namedtuples.get((name, fields))


def is_namedtuple(kind: type) -> bool:
    """Tell whether `kind` is a class made by `namedtuple` or `NamedTuple`, or inherits of one."""
    names = getattr(kind, "_fields", None)
    return (
        issubclass(kind, tuple)
        and isinstance(names, tuple)
        and all(type(name) is str for name in names)
        and callable(getattr(kind, "_make", None))
    )


def how_to_register(kind: type) -> str:
    """Say what makes values of `kind` storable: a line of code, whole where it can be."""
    if kind.__module__ in ("dist_ckpt.state.train_state", "dist_ckpt.state.slots"):
        return "it can only be a part of the state, not something inside one"
    line = f"dist_ckpt.register_type({kind.__qualname__}, name="
    if issubclass(kind, Enum) or is_dataclass(kind) or is_namedtuple(kind):
        return f"register the class before: {line}{kind.__name__!r})"
    # Objects of other libraries, and the generators of torch, Python and numpy, too. Not what their
    # state is: a copy, which is refused or goes stale.
    asked = ("load_state_dict", "set_state", "setstate", "bit_generator")
    if any(hasattr(kind, name) for name in asked):
        return (
            "give it a name of its own in the state: it is asked for its state at each save; or, "
            "inside of what a state_dict() returned, have that return the state_dict() of it"
        )
    if issubclass(kind, np.random.BitGenerator):
        return "give numpy.random.Generator() of it a name of its own in the state"
    plain = "make it of plain values and tensors"
    if issubclass(kind, np.ndarray):
        # Of a masked one `asarray` is the data alone, without a word.
        plain = "make it a plain array, numpy.asarray() of it (and a masked one its data and mask)"
    elif issubclass(kind, np.generic):
        plain = "make it a plain value, .item() of it"
    return f"{plain}, or teach dist_ckpt the type: {line}..., encode=..., decode=...)"


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

    An enum, a dataclass or a namedtuple needs no functions: of an enum its value is stored, of the
    others their fields by name. A dataclass comes back with these fields as they were, and
    `__init__` and `__post_init__` are not called; a field that the class has got since takes its
    default.

    Args:
        type_: the class. Subclasses are other types.
        name: what checkpoints call it, for ever; the class itself may move or be renamed.
        encode: value to something made of supported types.
        decode: what `encode` returned to an equal value.

    Raises:
        UsageError: no class, or one that is stored as it is, a bad or taken name, or no functions
            for a class that needs them.
    """
    if not isinstance(type_, type):
        raise UsageError(f"register_type takes a class, not {type_!r}")
    if is_written_as_such(type_):
        raise UsageError(
            f"{_label(type_)} is stored as it is, and no functions are asked for it: register a "
            "class of your own"
        )
    if not isinstance(name, str) or not name or not name.isprintable():
        raise UsageError(f"bad name {name!r} for {_label(type_)}: must be printable text")
    if name.startswith(RESERVED):
        raise UsageError(f"bad name {name!r}: what begins with {RESERVED!r} is dist_ckpt's own")
    if (encode is None) != (decode is None) and not issubclass(type_, Enum):
        raise UsageError(f"{_label(type_)}: give both encode= and decode=, or neither")
    for argument, function in (("encode", encode), ("decode", decode)):
        if function is not None and not callable(function):
            raise UsageError(f"{_label(type_)}: {argument}= takes a function, not {function!r}")
    own = _own_form(type_) or (None, None)
    to_plain, from_plain = encode or own[0], decode or own[1]
    # Nothing is guessed, not even from __reduce__: what is stored is what `encode` says.
    if to_plain is None or from_plain is None:
        raise UsageError(
            f"{_label(type_)} is no enum, dataclass or namedtuple: register it with encode= and "
            "decode="
        )
    REGISTRY.add(Registered(type_, name, to_plain, from_plain, (encode, decode)))


def _own_form(
    type_: type,
) -> tuple[Callable[[Any], object], Callable[[Any], Any]] | None:
    """Return how a class that says itself what it is made of is encoded and decoded."""
    if issubclass(type_, Enum):
        return attrgetter("value"), type_
    if is_dataclass(type_):
        return _fields_of, lambda stored: _filled(type_, stored)
    if is_namedtuple(type_):
        REGISTRY.learn(type_)  # for what was stored before it was registered
        made: Any = type_
        return lambda value: value._asdict(), lambda stored: made(**stored)
    return None


def _fields_of(value: Any) -> dict[str, object]:
    names = [field.name for field in fields(value)]
    besides = sorted(getattr(value, "__dict__", {}).keys() - set(names))
    if besides:
        raise ValueError(
            f"it has attributes that are no fields ({', '.join(besides)}): register the class with "
            "encode= and decode="
        )
    return {name: getattr(value, name) for name in names}


def _filled(type_: Any, stored: Mapping[str, Any]) -> Any:
    known = {field.name: field for field in fields(type_)}
    unknown = sorted(stored.keys() - known.keys())
    if unknown:
        raise ValueError(f"{_label(type_)} has no field {unknown[0]!r}")
    built = type_.__new__(type_)
    for name, field in known.items():
        if name in stored:
            value = stored[name]
        elif field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            raise ValueError(f"{name!r} is missing, and {_label(type_)} has no default for it")
        # Past __setattr__, which a frozen class refuses; only names of fields come here.
        object.__setattr__(built, name, value)
    return built
