"""A dict that was saved as one value, seen as the named entries that it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import TAG, dumps, is_wrapped_node
from dist_ckpt.state.names import wrapper_prefix


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a dict, by their keys joined with dots, without the prefix of a wrapper.

    Attributes:
        tensors: one or more for a tensor, by the name under which that is stored.
        objects: everything else, encoded.
    """

    tensors: dict[str, list[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


def entries_of(data: bytes, *, path: str) -> Entries | None:
    """Return the entries of the encoded dict `data`; None if it is no dict of strings.

    Raises:
        IntegrityError: `data` is no encoding.
    """
    pairs = _pairs(parse_document(data, path))
    if pairs is None:
        return None
    found = Entries()
    walked = list(_walk(pairs, ()))
    prefix = wrapper_prefix([name for name, _ in walked])
    for full, node in walked:
        name = full.removeprefix(prefix)
        if _is_tensor(node):
            found.tensors.setdefault(node["v"], []).append(name)
        else:
            found.objects[name] = dumps(node).encode()
    return found


def _walk(pairs: list[tuple[str, Any]], steps: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, node in pairs:
        if is_wrapped_node(node):
            # A live one is filled by the tensors that it is made of, and needs nothing else.
            for suffix, inner in node["v"][1].items():
                yield ".".join((*steps, key)) + suffix, inner
            continue
        below = None if _is_tensor(node) else _pairs(node)
        if below:
            yield from _walk(below, (*steps, key))
        else:
            yield ".".join((*steps, key)), node


def _pairs(node: Any) -> list[tuple[str, Any]] | None:
    """Return the items of an encoded dict whose keys are strings."""
    if not isinstance(node, dict):
        return None
    if TAG not in node:
        return list(node.items())
    pairs = node.get("v")
    if node[TAG] not in ("dict", "ordered_dict") or not isinstance(pairs, list):
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return None
    return [(key, value) for key, value in pairs] if _are_strings(pairs) else None


def _are_strings(pairs: list[Any]) -> bool:
    return all(isinstance(pair[0], str) for pair in pairs)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, dict) and node.get(TAG) == "tensor" and isinstance(node.get("v"), str)
