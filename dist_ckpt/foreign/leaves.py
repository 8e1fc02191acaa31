"""The leaves of somebody's state dict, and the values that they were taken out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[Any, ...]


class DictKey(int):
    """A whole number that was the key of a dict, where others are positions in lists."""


class TupleKey(int):
    """A position in a tuple."""


@dataclass(frozen=True, slots=True)
class ForeignLeaf:
    """One leaf of a state dict.

    Attributes:
        path: the keys that lead to it.
        dtype: of a tensor, None for a Python value.
        shape: of a tensor.
        value: the Python value.
        made: of one of several tensors behind one face: what comes behind the name of the whole,
            and how that is made.
    """

    path: Path
    dtype: str | None
    shape: tuple[int, ...] = ()
    value: Any = None
    made: tuple[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class PartLeaf:
    """A leaf in the part that it belongs to.

    Attributes:
        number: its place among all leaves.
        path: the keys that lead to it in the part.
        entry: the leaf itself.
    """

    number: int
    path: Path
    entry: ForeignLeaf


def dotted(path: Path) -> str:
    """Return the name that a path makes up."""
    return ".".join(map(str, path))


def content(leaf: PartLeaf) -> Any:
    """Return the value of a leaf, and itself for a tensor."""
    return leaf if leaf.entry.dtype is not None else leaf.entry.value


def nested_at(leaves: Sequence[PartLeaf], depth: int) -> Any:
    """Return the value that was taken apart into `leaves`, whose paths agree up to `depth`."""
    if len(leaves) == 1 and len(leaves[0].path) == depth:
        return content(leaves[0])
    below: dict[Any, list[PartLeaf]] = {}
    for leaf in leaves:
        below.setdefault(leaf.path[depth], []).append(leaf)
    values = {key: nested_at(inner, depth + 1) for key, inner in below.items()}
    # DCP takes lists apart by position, and dicts by string keys only.
    # By exact type, as `DictKey` and `TupleKey` are ints, too.
    if all(type(key) is int for key in values):
        return [values[key] for key in sorted(values)]
    if all(type(key) is TupleKey for key in values):
        return tuple(values[key] for key in sorted(values))
    return {int(key) if type(key) is DictKey else key: each for key, each in values.items()}
