"""From tagged JSON to plain Python values: the walk behind `dist_ckpt.state.objects.decode`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec
import torch

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    describe,
    is_refusal,
)
from dist_ckpt.format.limits import check_hashes
from dist_ckpt.state.aside import BYTES, NDARRAY, from_aside
from dist_ckpt.state.encoding import LAYOUT, MAX_DEPTH, PAIRS, SETS, TAG, UNREADABLE
from dist_ckpt.state.leaves import BY_TAG
from dist_ckpt.state.rebuilding import Building
from dist_ckpt.state.registry import REGISTRY
from dist_ckpt.state.standard import NAMEDTUPLE, RESERVED, STANDARD_BY_NAME, WRAPPED

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
    """One walk over one parsed encoding; see `dist_ckpt.state.objects.decode`."""

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self._path = path
        self._tensors = tensors

    def value_of(self, node: Any, depth: int = 0) -> Any:
        """Return the value that `node`, at `depth` levels of JSON objects, stands for."""
        if depth > 2 * MAX_DEPTH:  # each level of a value is at most two of JSON
            raise self._malformed("nests too deeply")
        if isinstance(node, list):
            if _CONTAINERS.isdisjoint(map(type, node)):
                return node  # of this walk alone, and of what JSON itself has
            return [self.value_of(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node  # what JSON itself has is what it looks like
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
    node, checked = _as_encoded(data), True
    if node is _OTHER:
        try:
            node = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _malformed(path, f"is no valid JSON: {describe(error)}") from error
        checked = False
    # Here for all who walk over it, since how deep the reader of JSON goes depends on the release.
    for depth, level in enumerate(_levels(node), start=1):
        if depth > _MAX_JSON_DEPTH:
            raise _malformed(path, "nests too deeply")
        # Python reads 1e999 without complaint, and what we wrote has none. Looked for in whole
        # lists, as a function that is called for each number takes longer than all the rest.
        if not checked and any(math.inf in items or -math.inf in items for items in level):
            raise _malformed(path, "has a number that is not finite")
    return node


def _as_encoded(data: bytes) -> Any:
    """Return the JSON in `data` if it is written as `encode` does, or else `_OTHER`.

    Python's reader takes many times as long. This one drops a key that occurs twice, which what it
    reads does not have then: written again, it is other bytes.
    """
    try:
        node = msgspec.json.decode(data)
        return node if msgspec.json.encode(node) == data else _OTHER
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _OTHER


def _levels(node: Any) -> Iterator[list[Collection[Any]]]:
    """Yield what is in the lists and dicts of each level of `node`, the outermost first."""
    level: list[Collection[Any]] = [[node]]
    while level:
        yield level
        level = [
            item.values() if type(item) is dict else item
            for items in level
            if not _CONTAINERS.isdisjoint(map(type, items))
            for item in items
            if type(item) in _CONTAINERS
        ]


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


def names_aside(node: Any) -> Iterator[str]:
    """Yield the name of each tensor in `node` that is the bytes of an array or of a string."""
    if isinstance(node, dict):
        if node.get(TAG) in _ASIDE_TAGS:
            yield from tensor_names(node.get("v"))
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from names_aside(item)


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
