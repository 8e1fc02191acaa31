"""Plain Python values as typed JSON: exact, readable, and never executed.

`None`, bools, integers, finite floats and strings are themselves; a list is an array; a dict
whose keys are all strings (and none is `"!"`) is an object. Everything else is a tagged object
`{"!": tag, "v": payload}`, whose tags are those of `dist_ckpt.state.leaves`, of containers,
`"tensor"` (the name of a tensor stored beside), and `"@name"` for a registered type; those of
`dist_ckpt.state.standard` are registered out of the box. Large arrays and byte strings are stored
beside the encoding, too (`dist_ckpt.state.aside`).
Reading an encoding imports nothing, evaluates nothing and allocates nothing beyond its length.

A list that is reached twice comes back as two lists. The order of sets is not kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from dist_ckpt.format.digest import bytes_digest
from dist_ckpt.state.decoding import Decoder, names_aside, parse_document, tensor_names
from dist_ckpt.state.encoding import TAG, Encoder
from dist_ckpt.state.registry import register
from dist_ckpt.state.standard import NAMEDTUPLE, RESERVED, WRAPPED

__all__ = [
    "decode",
    "encode",
    "fillable",
    "may_refer",
    "needs_classes",
    "references",
    "references_aside",
    "register",
    "unordered_digest",
    "wrapped_as_json",
]

# What is written as pairs, because a key of it is no text.
_UNORDERED = re.compile(rb'"!":"(?:dict|counter)"')


def encode(
    value: object,
    *,
    path: str,
    tensors: dict[str, torch.Tensor] | None = None,
    prefix: str = "",
    aside: bool = True,
    large_only: bool = False,
) -> bytes:
    """Return `value` as UTF-8 JSON; the same value gives the same bytes on every rank.

    Args:
        value: any nesting of the supported types, at most 64 deep.
        path: what `value` is called in the state, for messages.
        tensors: receives every tensor in `value`, by name; its bytes stay out of the encoding.
            None puts them into the encoding.
        prefix: the first component of those names; further ones are keys and list positions.
        aside: whether the bytes of large arrays and byte strings go there too, as tensors.
        large_only: whether small tensors, and DTensors, are put into the encoding all the same.

    Raises:
        UsageError: of kind `UNENCODABLE`, naming the path and type of what cannot be stored.
    """
    # Many times as fast as Python's json where strings are long, as those of per-rank arrays are.
    encoder = Encoder(path, tensors, prefix, aside=aside, large_only=large_only)
    return msgspec.json.encode(encoder.json_of(value))


def wrapped_as_json(made: Mapping[str, Any], names: Mapping[str, str], *, path: str) -> bytes:
    """Return the encoding of a tensor that is several behind one face, and lies nowhere whole.

    Args:
        made: how it is made; see `dist_ckpt.state.rebuilding.how_made`.
        names: of the tensors that it is made of, by what comes behind the name of the whole.
        path: what it is called, for messages.
    """
    inner = {suffix: {TAG: "tensor", "v": name} for suffix, name in names.items()}
    parts = [msgspec.Raw(encode(dict(made), path=path)), inner]
    return msgspec.json.encode({TAG: f"@{RESERVED}{WRAPPED}", "v": parts})


def fillable(value: object, *, path: str, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors in `value` that a load can fill, by the names that `encode` gives them.

    They are those of `value` themselves, on the meta device too. A tensor that is reached twice is
    there under both names.

    Args:
        value: as for `encode`.
        path: what `value` is called in the state, for messages.
        prefix: the first component of the names.

    Raises:
        UsageError: as for `encode`.
    """
    tensors: dict[str, torch.Tensor] = {}
    Encoder(path, tensors, prefix, to_fill=True).json_of(value)
    return tensors


def decode(data: bytes, *, tensors: Mapping[str, torch.Tensor], path: str = "value") -> Any:
    """Return the value that `encode` made `data` from; `tensors` are those it names.

    Raises:
        IntegrityError: `data` is not such an encoding, or names a tensor that is not there.
        IncompatibleError: it holds a type that is not registered in this program, or whose
            decoder refuses it.
    """
    return Decoder(path, tensors).value_of(parse_document(data, path))


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
    return tuple(dict.fromkeys(names_aside(parse_document(data, path))))


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
