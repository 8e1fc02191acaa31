"""From typed JSON to plain Python values, and what can be told of an encoding without its values.

Reading an encoding (see `dist_ckpt.state.encoding`) imports nothing, evaluates nothing and
allocates nothing beyond its length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    describe,
    is_refusal,
)
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import check_hashes
from dist_ckpt.state.encoding import (
    BYTES,
    LAYOUT,
    MAX_DEPTH,
    NDARRAY,
    TAG,
    UNREADABLE,
    from_aside,
)
from dist_ckpt.state.rebuilding import Building
from dist_ckpt.state.registry import REGISTRY
from dist_ckpt.state.standard import (
    BY_TAG,
    NAMEDTUPLE,
    PAIRS,
    RESERVED,
    SETS,
    STANDARD_BY_NAME,
    WRAPPED,
)

_LONG_BYTES = 1 << 16
# What is written as pairs, because a key of it is no text.
_UNORDERED = re.compile(rb'"!":"(?:dict|counter)"')


def decode(data: bytes, *, tensors: Mapping[str, torch.Tensor], path: str = "value") -> Any:
    """Return the value that `encode` made `data` from; `tensors` are those it names.

    Raises:
        IntegrityError: `data` is not such an encoding, or names a tensor that is not there.
        IncompatibleError: it holds a type that is not registered in this program, or whose
            decoder refuses it.
    """
    at_most = _at_most(data)
    return Decoder(path, tensors, at_most=at_most).value_of(_parsed(data, path, at_most))


def references(data: bytes, *, path: str = "value") -> tuple[str, ...]:
    """Return the names of the tensors stored beside `data`, in order of appearance.

    Raises:
        IntegrityError: `data` is not an encoding.
    """
    return tuple(dict.fromkeys(tensor_names(parse_document(data, path))))


def may_refer(data: bytes) -> bool:
    """Tell whether there may be references in `data`: to parse it for nothing takes its time."""
    return b'"tensor"' in data


def references_aside(data: bytes, *, path: str = "value") -> tuple[str, ...]:
    """Return the names of those tensors beside `data` that are the bytes of arrays and strings.

    Raises:
        IntegrityError: `data` is not an encoding.
    """
    return tuple(dict.fromkeys(_names_aside(parse_document(data, path))))


def unordered_digest(data: bytes) -> str:
    """Return a digest of an encoding that is the same in whatever order its dicts were filled.

    Equal dicts have equal ones, as in Python: that of an `OrderedDict` goes by its order.
    """
    node = msgspec.json.decode(data)
    if _UNORDERED.search(data):
        node = _sorted(node)
    return bytes_digest(msgspec.json.encode(node, order="sorted"))


def _sorted(node: Any) -> Any:
    if isinstance(node, list):
        return [_sorted(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _sorted(item) for key, item in node.items()}
    if node.get(TAG) in ("dict", "counter"):
        found["v"] = sorted(found["v"], key=lambda pair: msgspec.json.encode(pair[0]))
    return found


def needs_classes(data: bytes) -> bool:
    """Tell whether `data` may hold namedtuples: `decode` makes them of classes `encode` has met."""
    return f'"@{RESERVED}{NAMEDTUPLE}"'.encode() in data


# From tagged JSON to plain Python values: the walk behind `decode`.


_FROM_PAIRS: dict[str, Callable[[dict[Any, Any]], object]] = {
    tag: kind for kind, tag in PAIRS.items()
}
_FROM_ITEMS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    **{tag: kind for kind, tag in SETS.items()},
}

_ASIDE_TAGS = frozenset(f"@{RESERVED}{name}" for name in (NDARRAY, BYTES))

_CONTAINERS = frozenset((dict, list))
_OTHER = object()

# A pair of an ordered dict lies three levels of JSON below it, and dtypes nest by themselves.
_MAX_JSON_DEPTH = 5 * MAX_DEPTH


Layout = tuple[tuple[str | None, int | None], ...]
"""For each dimension of the mesh its name and the dimension that is cut along it; None for none."""


class Decoder:
    """One walk over one parsed encoding; see `decode`."""

    def __init__(
        self, path: str, tensors: Mapping[str, torch.Tensor], *, at_most: int | None = None
    ) -> None:
        self._path = path
        self._tensors = tensors
        # How many lists and dicts are still to be met, or more: with none left, a long list of
        # numbers need not be looked through for them.
        self._left = -1 if at_most is None else at_most

    def value_of(self, node: Any, depth: int = 0) -> Any:
        """Return the value that `node`, at `depth` levels of JSON objects, stands for."""
        if depth > 2 * MAX_DEPTH:  # each level of a value is at most two of JSON
            raise self._malformed("nests too deeply")
        if isinstance(node, list):
            self._left -= 1
            if not self._left or _CONTAINERS.isdisjoint(map(type, node)):
                return node  # of this walk alone, and of what JSON itself has
            return [self.value_of(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node  # what JSON itself has is what it looks like
        self._left -= 1
        if TAG not in node:
            return {key: self.value_of(item, depth + 1) for key, item in node.items()}
        # A dict of the state that has a key "!" was written as pairs, so this can only be a tag.
        if not isinstance(node[TAG], str) or not (node.keys() == {TAG, "v"} or _is_placed(node)):
            raise self._malformed("has a tag that is not a pair of tag and payload")
        return self._tagged(node[TAG], node["v"], depth + 1)

    def _tagged(self, tag: str, payload: Any, depth: int) -> Any:
        if tag.startswith("@") and not tag.startswith(f"@{RESERVED}"):
            return self._registered(tag[1:], payload, depth)
        if tag == UNREADABLE:
            raise IncompatibleError(f"{self._path} cannot be read: {payload}")
        try:
            if tag.startswith(f"@{RESERVED}"):
                return self._standard(tag[1 + len(RESERVED) :], payload, depth)
            if tag in BY_TAG:
                return BY_TAG[tag].decode(payload)
            if tag == "tensor":
                return self._tensors[payload]
            # Only tags that are listed here build anything: no name is looked up elsewhere.
            if tag in _FROM_ITEMS:
                items = self.value_of(payload, depth)
                if tag != "tuple":
                    check_hashes(items)
                return _sized(_FROM_ITEMS[tag](items), items)
            if tag in _FROM_PAIRS:
                pairs = [(self.value_of(k, depth), self.value_of(v, depth)) for k, v in payload]
                check_hashes([key for key, _ in pairs])
                return _sized(_FROM_PAIRS[tag](dict(pairs)), pairs)
        except CheckpointError:
            raise  # from a value further in, which named the fault already
        except Exception as error:  # every way in which a payload can fail to be what its tag says
            raise self._malformed(f"has a bad {tag!r}: {describe(error)}") from error
        raise self._malformed(f"has the unknown tag {tag!r}")

    def _registered(self, name: str, payload: Any, depth: int) -> Any:
        entry = REGISTRY.by_name(name)
        if entry is None:
            raise IncompatibleError(
                f"{self._path} holds a value of the registered type {name!r}: call "
                f"dist_ckpt.register_type(..., name={name!r}, ...) before loading"
            )
        value = self.value_of(payload, depth)  # outside: damage is not the decoder's refusal
        try:
            return entry.decode(value)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(
                f"the decoder registered for {name!r} refused what {self._path} holds: "
                f"{describe(error)}"
            ) from error

    def _standard(self, name: str, payload: Any, depth: int) -> Any:
        if name not in STANDARD_BY_NAME and name not in (NAMEDTUPLE, NDARRAY, BYTES, WRAPPED):
            raise IncompatibleError(
                f"{self._path} holds a value of the type {name!r}, which this dist_ckpt does not "
                "know: load it with a newer one"
            )
        head, body = self.value_of(payload, depth)
        if name in (NDARRAY, BYTES):
            return from_aside(name, head, body)
        if name == WRAPPED:
            return Building(head, self._path).build(body)
        if name == NAMEDTUPLE:
            return self._namedtuple(head, body)
        return STANDARD_BY_NAME[name].build(head, body)

    def _namedtuple(self, head: Any, items: Any) -> Any:
        name, fields = head
        if len(items) != len(fields):
            raise ValueError(f"{len(items)} items for {len(fields)} fields")
        kind = REGISTRY.namedtuple(name, tuple(fields))
        if kind is None:
            raise IncompatibleError(
                f"{self._path} holds a namedtuple {name}({', '.join(map(str, fields))}), and no "
                "such class was shown to dist_ckpt: call dist_ckpt.register_type("
                f"{name}, name={name!r}) before loading"
            )
        return kind._make(items)

    def _malformed(self, what: str) -> IntegrityError:
        return _malformed(self._path, what)


def _is_placed(node: Any) -> bool:
    """Tell whether `node` is a reference to a tensor that says how it lay."""
    layout = node.get(LAYOUT)
    return (
        node[TAG] == "tensor"
        and node.keys() == {TAG, "v", LAYOUT}
        and isinstance(node["v"], str)
        and isinstance(layout, list)
        and all(isinstance(each, list) and len(each) == 2 for each in layout)
        and all(isinstance(name, str | None) for name, _ in layout)
        and all(dim is None or type(dim) is int for _, dim in layout)
    )


def _sized(built: Any, parts: list[Any]) -> Any:
    # The encoder never writes one twice, and the second would silently replace the first.
    if len(built) != len(parts):
        raise ValueError("an element or key occurs twice")
    return built


def parse_document(data: bytes, path: str) -> Any:
    """Return the JSON in `data`, an IntegrityError that names `path` if there is none."""
    return _parsed(data, path, _at_most(data))


def _parsed(data: bytes, path: str, at_most: int) -> Any:
    node = _decoded(data)
    if node is not _OTHER:
        nkeys = _check_levels(node, path, at_most)
        # Of a key that occurs twice this reader drops one. Each has a colon: where all colons are
        # those of keys that are there, none was dropped. Else what is written again tells.
        if _count(data, ord(":")) == nkeys or msgspec.json.encode(node) == data:
            return node
    try:
        node = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"is no valid JSON: {describe(error)}") from error
    _check_levels(node, path)
    return node


def _at_most(data: bytes) -> int:
    """Return how many lists and dicts there can be in `data`: fewer where texts have brackets."""
    return _count(data, ord("[")) + _count(data, ord("{"))


def _count(data: bytes, byte: int) -> int:
    # Python counts one byte as it finds any text: of megabytes that takes as long as to parse them.
    if len(data) < _LONG_BYTES:
        return data.count(byte)
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == byte))


def _decoded(data: bytes) -> Any:
    """Return the JSON in `data`, many times as fast as Python's reader does; `_OTHER` if unsure."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _OTHER


def _check_levels(node: Any, path: str, at_most: int | None = None) -> int:
    """Check how deep `node` goes, and that its numbers are finite; return how many keys there are.

    Args:
        node: what was read.
        path: what it is called.
        at_most: how many lists and dicts there can be in it, of a reader that refuses what is not
            finite; None for Python's, which takes 1e999 without complaint.

    Raises:
        IntegrityError: it nests too deeply, or a number is not finite.
    """
    nkeys, left = 0, -1 if at_most is None else at_most + 1
    level: list[Any] = [[node]]
    # Here for all who walk over it, since how deep the reader of JSON goes depends on the release.
    for _ in range(_MAX_JSON_DEPTH):
        nkeys += sum(len(each) for each in level if type(each) is dict)
        left -= len(level)
        inside = [each.values() if type(each) is dict else each for each in level]
        # Looked for in whole lists: a function that is called for each number takes longer than
        # all the rest.
        if at_most is None and any(math.inf in items or -math.inf in items for items in inside):
            raise _malformed(path, "has a number that is not finite")
        if not left:
            return nkeys  # all were met: a long list of numbers is not looked through for more
        level = [each for items in inside for each in _containers_in(items)]
        if not level:
            return nkeys
    raise _malformed(path, "nests too deeply")


def _containers_in(items: Collection[Any]) -> Iterable[Any]:
    if _CONTAINERS.isdisjoint(map(type, items)):
        return ()
    return (item for item in items if type(item) in _CONTAINERS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(_sized(dict(pairs), pairs))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _malformed(path: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"the stored value {path} {what}; this checkpoint is damaged", kind=ErrorKind.MALFORMED
    )


def tensor_names(node: Any) -> Iterator[str]:
    """Yield the name of every tensor that the parsed encoding `node` refers to."""
    if isinstance(node, dict):
        # A dict of the state is never stored with a key "!", so this can only be a tag.
        if node.get(TAG) == "tensor" and isinstance(node.get("v"), str):
            yield node["v"]
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from tensor_names(item)


def _names_aside(node: Any) -> Iterator[str]:
    """Yield the name of each tensor in `node` that is the bytes of an array or of a string."""
    if isinstance(node, dict):
        if node.get(TAG) in _ASIDE_TAGS:
            yield from tensor_names(node.get("v"))
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _names_aside(item)


def layouts_in(node: Any) -> Iterator[tuple[str, Layout]]:
    """Yield the name and the layout of each DTensor that the parsed encoding `node` refers to."""
    if isinstance(node, dict):
        if node.get(TAG) == "tensor" and LAYOUT in node:
            yield node["v"], tuple((name, dim) for name, dim in node[LAYOUT])
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from layouts_in(item)
