"""What the values of a pickle cost whoever hashes, copies or walks over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dist_ckpt.foreign.stand_ins import Made

MAX_DEPTH = 100
_MAX_KEY_NODES = 1000
_TEXT_PER_NODE = 16
_INT_BITS_PER_NODE = 256


def hash_nodes(key: Any) -> int:
    """Return how many values the hash of `key` goes through; it goes down tuples, unguarded.

    Raises:
        ValueError: they are too many, or too deep.
    """
    if type(key) is int:
        return 1 + key.bit_length() // _INT_BITS_PER_NODE
    if type(key) is not tuple:
        return 1
    nodes, depth, level = 0, 0, [key]
    while level:
        nodes += len(level)
        depth += 1
        tuples = [each for each in level if type(each) is tuple]
        # A tuple twice in another, and that twice in a third, counts as often as it is met.
        if nodes + sum(map(len, tuples)) > _MAX_KEY_NODES or depth > MAX_DEPTH:
            raise ValueError("it has a key that is too large to be one")
        level = [item for each in tuples for item in each]
    return nodes


def nodes_of(value: Any) -> int:
    """Return what a copy of `value`, without what is in its items, costs."""
    if isinstance(value, bytes | bytearray):
        # Each is written once: only text, as the names of parameters, is shared to save bytes.
        return 1 + len(value)
    if isinstance(value, str):
        return 1 + len(value) // _TEXT_PER_NODE
    if isinstance(value, list | tuple | dict | set | frozenset):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // _INT_BITS_PER_NODE
    return 1


def check_tree(value: Any, limit: int) -> None:
    """Refuse a value that is small only because it shares its pieces, or that is in itself.

    Whoever walks over it later meets a shared piece as often as it is shared.

    Raises:
        ValueError: it has more than `limit` values in it, or they nest too deep.
    """
    left = limit
    walk: list[Iterator[Any]] = [iter((value,))]
    while walk:
        for item in walk[-1]:
            kind = type(item)
            inner = () if kind is str or kind is int else _inside(item)
            left -= 1 if inner else nodes_of(item)
            if left < 0:
                raise ValueError("its values share one another until there are too many")
            if inner:
                walk.append(iter(inner))
                break
        else:
            walk.pop()
        if len(walk) > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} deep, or is in itself")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if type(value) is Made:
        return (value.arguments, value.state)
    return ()
