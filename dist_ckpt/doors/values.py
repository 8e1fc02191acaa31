"""In which Python values two checkpoints differ: each difference by its path, as people write it.

The encodings are compared, not what they would be decoded to: so no type has to be registered, and
nothing is made of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import decode_document
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.copying import ValuesDiffer
from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import TAG
from dist_ckpt.state.standard import BY_TAG, NAMEDTUPLE, PAIRS, RESERVED, SETS
from dist_ckpt.state.value_fit import VALUE

_PAIRS = frozenset(PAIRS.values())
_SETS = frozenset(SETS.values())
_LONG = 60
# From so many on, the items of one list are said together.
_MANY = 8


@dataclass(frozen=True, slots=True)
class ValueChange:
    """One Python value in which two checkpoints differ.

    Attributes:
        part: which part it is of.
        rank: whose value it is; None where all ranks share it.
        path: where in the part, as `param_groups[0].lr`; "" for all of it.
        here: what it is in the first one, cut short; "" where it is not.
        there: the same of the second one.
    """

    part: str
    rank: int | None
    path: str
    here: str
    there: str


def value_changes(
    one: Checkpoint, other: Checkpoint, differing: Iterable[ValuesDiffer]
) -> Iterator[ValueChange]:
    """Yield the values that differ; none where only the order of dicts does.

    Args:
        one: the first checkpoint.
        other: the second one.
        differing: whose values are read.

    Raises:
        IntegrityError: values are damaged or missing.
    """
    for each in differing:
        mine, theirs = (_values(checkpoint, each) for checkpoint in (one, other))
        for path, here, there in _in_dicts(mine, theirs, ""):
            # A part that is one value is called by its own name.
            bare = path.removeprefix(VALUE)
            named = bare.removeprefix(".") if bare[:1] in (".", "[", "") else path
            yield ValueChange(each.part, each.rank, named, here, there)


def _values(checkpoint: Checkpoint, which: ValuesDiffer) -> dict[str, Any]:
    where = f"part {which.part!r} of {checkpoint.where}"
    found: dict[str, Any] = {}
    for entry in checkpoint.index.objects:
        if (entry.part, entry.rank) == (which.part, which.rank):
            for name, data in decode_document(checkpoint.read_object(entry), where=where).items():
                found[name] = parse_document(data, f"{which.part}.{name}")
    return found


_Found = Iterator[tuple[str, str, str]]
"""Path, what is here, what is there."""


def _differences(a: Any, b: Any, path: str) -> _Found:
    # Most of two checkpoints is equal, and ends here.
    if _text(a) == _text(b):
        return
    kind = _kind(a)
    if kind != _kind(b):
        yield path, _shown(a), _shown(b)
    elif kind == "object":
        yield from _in_dicts(a, b, path)
    elif kind in ("list", "tuple"):
        yield from _in_lists(_items(a), _items(b), path)
    elif kind in _PAIRS:
        yield from _in_pairs(a, b, path, ordered=kind == "ordered_dict")
    # Of one name with the same fields; with others it is another type now.
    elif kind == f"@{RESERVED}{NAMEDTUPLE}" and a["v"][0] == b["v"][0]:
        mine, theirs = (dict(zip(a["v"][0][1], each["v"][1], strict=False)) for each in (a, b))
        yield from _in_dicts(mine, theirs, path)
    elif kind.startswith("@"):
        yield from _in_registered(a, b, path)
    # The order in which a set happened to be encoded is no difference.
    elif kind not in _SETS or sorted(map(_text, a["v"])) != sorted(map(_text, b["v"])):
        yield path, _shown(a), _shown(b)


def _in_dicts(a: Mapping[str, Any], b: Mapping[str, Any], path: str) -> _Found:
    # In the order in which they are stored: what belongs together stays together.
    for key in dict.fromkeys((*a, *b)):
        inner = f"{path}.{key}" if path else key
        if key in a and key in b:
            yield from _differences(a[key], b[key], inner)
        else:
            yield inner, _shown_of(a, key), _shown_of(b, key)


def _in_lists(a: Sequence[Any], b: Sequence[Any], path: str) -> _Found:
    # One item more in front would show every other one as changed.
    if len(a) != len(b):
        yield path, f"{len(a)} items", f"{len(b)} items"
        return
    found = [
        each
        for number, (mine, theirs) in enumerate(zip(a, b, strict=True))
        for each in _differences(mine, theirs, f"{path}[{number}]")
    ]
    if len(found) > _MANY and not any(isinstance(each, list | dict) for each in (*a, *b)):
        first, here, there = found[0]
        found = [(f"{first} and {len(found) - 1} more", here, there)]
    yield from found


def _in_pairs(a: Any, b: Any, path: str, *, ordered: bool) -> _Found:
    mine, theirs = ({_key(key): value for key, value in each["v"]} for each in (a, b))
    found = False
    for key in dict.fromkeys((*mine, *theirs)):
        inner = (path + key).removeprefix("" if path else ".")
        if key in mine and key in theirs:
            changes = list(_differences(mine[key], theirs[key], inner))
        else:
            changes = [(inner, _shown_of(mine, key), _shown_of(theirs, key))]
        found = found or bool(changes)
        yield from changes
    # Here all pairs are equal: of an OrderedDict the order is a part of the value.
    if ordered and not found:
        yield path, _shown(a), _shown(b)


def _in_registered(a: Any, b: Any, path: str) -> _Found:
    """Yield the differences of what values of one registered type consist of."""
    mine, theirs = a["v"], b["v"]
    if a[TAG].startswith(f"@{RESERVED}"):
        (head, mine), (other, theirs) = mine, theirs
        # Other heads are other kinds of the value: what is in them is not comparable.
        if head != other:
            yield path, _shown(a), _shown(b)
            return
    yield from _differences(mine, theirs, path)


def _kind(node: Any) -> str:
    if isinstance(node, list):
        return "list"
    if not isinstance(node, dict):
        return ""
    return str(node[TAG]) if TAG in node else "object"


def _items(node: Any) -> list[Any]:
    found: list[Any] = node if isinstance(node, list) else node["v"]
    return found


def _text(node: Any) -> bytes:
    # Not by `==`, for which 1, 1.0 and True are one.
    return msgspec.json.encode(node, order="sorted")


def _key(node: Any) -> str:
    """Return how a key of a dict goes on a path."""
    return f".{node}" if isinstance(node, str) else f"[{_full(node)}]"


def _shown_of(values: Mapping[str, Any], key: str) -> str:
    return _shown(values[key]) if key in values else ""


def _shown(node: Any) -> str:
    text = _full(node)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _full(node: Any) -> str:
    kind = _kind(node)
    if kind == "":
        return repr(node)
    if kind == "object":
        return f"{{{', '.join(f'{key!r}: {_full(each)}' for key, each in node.items())}}}"
    payload = node if kind == "list" else node["v"]
    if kind in BY_TAG:
        value = BY_TAG[kind].decode(payload)
        if isinstance(value, torch.Tensor | np.ndarray):
            # By its first elements no two large ones can be told apart.
            return f"{value.dtype}{list(value.shape)} of digest {bytes_digest(_text(node))[:8]}"
        return repr(value)
    if kind in _PAIRS:
        pairs = [(key, _full(each)) for key, each in payload]
        if kind == "dict":
            return f"{{{', '.join(f'{_full(key)}: {each}' for key, each in pairs)}}}"
        inner = ", ".join(f"{_key(key).removeprefix('.')}={each}" for key, each in pairs)
        return f"{'OrderedDict' if kind == 'ordered_dict' else 'Counter'}({inner})"
    if kind == "list" or kind == "tuple" or kind in _SETS:
        inner = ", ".join(map(_full, sorted(payload, key=_text) if kind in _SETS else payload))
        return {"list": f"[{inner}]", "tuple": f"({inner})"}.get(kind, f"{{{inner}}}")
    return f"{kind.removeprefix('@')} {msgspec.json.encode(payload).decode()}"
