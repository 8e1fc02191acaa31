"""Plain Python values as typed JSON: exact, readable, and never executed.

`None`, bools, integers, finite floats and strings are themselves; a list is an array; a dict
whose keys are all strings (and none is `"!"`) is an object. Everything else is a tagged object
`{"!": tag, "v": payload}`, whose tags are those of `dist_ckpt.state.standard`, of containers,
`"tensor"` (the name of a tensor stored beside), and `"@name"` for a registered type, as those are
that `dist_ckpt.state.standard` takes apart. `dist_ckpt.state.decoding` reads it.

The bytes of large arrays and byte strings are put aside, to be stored as a tensor. What stays of
them in the encoding is how to read them, and their digest: values that must be equal on all ranks
are compared by their encodings, and so these bytes are compared at every save, too.

A list that is reached twice comes back as two lists. The order of sets is not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_ckpt.errors import ErrorKind, UsageError, describe, is_refusal
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.state.layout import check_tensor, is_wrapped
from dist_ckpt.state.rebuilding import how_made
from dist_ckpt.state.registry import REGISTRY, how_to_register, is_namedtuple
from dist_ckpt.state.spread import pieces
from dist_ckpt.state.standard import (
    NAMEDTUPLE,
    PAIRS,
    RESERVED,
    SETS,
    WRAPPED,
    Refuse,
    dtype_from_json,
    dtype_to_json,
    leaf_of,
    standard_of,
    tensor_to_json,
)

UNREADABLE = "unreadable"
"""The tag of what a foreign checkpoint holds and nobody can decode; its payload tells why."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that only a program which executes pickles could read.

    Attributes:
        reason: what is told to whoever wants the value.
    """

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Inline:
    """A tensor that belongs into the encoding of the value that holds it."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A tensor that is stored beside the value that holds it, and stays there.

    Attributes:
        name: what it is called there.
    """

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A value that was encoded before, and goes on as it is.

    Attributes:
        data: what `encode` returned.
        tensors: what is stored beside it, read when it is asked for.
    """

    data: bytes
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


TAG = "!"
LAYOUT = "layout"
"""Beside the tag `tensor` of a DTensor: how it lay (`dist_ckpt.loading.fitting`)."""

MAX_DEPTH = 64


def dumps(node: Any) -> str:
    """Return `node` as JSON without spaces; the same node gives the same text."""
    return json.dumps(node, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Encoder:
    """One walk over one value; see `encode` for the arguments."""

    def __init__(
        self,
        path: str,
        tensors: dict[str, torch.Tensor] | None,
        prefix: str,
        *,
        aside: bool = True,
        large_only: bool = False,
        to_fill: bool = False,
    ) -> None:
        self._path = path
        # Inside a value of one rank alone there is no beside.
        self._aside = aside and tensors is not None
        self._large_only = large_only
        self._tensors = tensors
        self._prefix = prefix
        # A walk to find what a load can fill: memory may be missing still, and each place counts,
        # the second one of a tensor too.
        self._to_fill = to_fill
        self._steps: list[tuple[str, str]] = []  # as shown to people, as a tensor name has it
        self._open: set[int] = set()
        self._hashed = 0  # how many sets and keys the walk is inside of
        # By identity. The tensor is kept too: one that a registered encoder made up would be gone
        # before the walk is over, and its identity another's.
        self._named: dict[int, tuple[torch.Tensor, str]] = {}
        self._wholes: dict[int, tuple[torch.Tensor, Any]] = {}
        self._suffix = ""  # of the inner tensor that is written down

    def json_of(self, value: Any) -> Any:
        """Return `value`, which lies where the walk is, as what `json` can write."""
        kind = type(value)
        # By exact type throughout: a subclass carries more than its base class can bring back.
        if value is None or kind is bool:
            return value
        leaf = leaf_of(kind)
        if leaf is not None:
            # In a key there is no tensor.
            if self._aside and not self._hashed:
                aside = _take_aside(value, self._refuse)
                if aside is not None:
                    return _apart(aside[0], [aside[1], self._beside(aside[2], aside[2])])
            plain, payload = leaf.encode(value, self._refuse)
            return payload if plain else {TAG: leaf.tag, "v": payload}
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        return self._nested(kind, value)

    def _nested(self, kind: type, value: Any) -> Any:
        # Only what is being walked counts: the same list twice side by side is no cycle.
        if id(value) in self._open:
            self._refuse(value, "it contains itself")
        if len(self._open) >= MAX_DEPTH:
            self._refuse(value, f"it lies more than {MAX_DEPTH} levels deep")
        self._open.add(id(value))
        try:
            return self._container(kind, value)
        finally:
            self._open.remove(id(value))

    def _container(self, kind: type, value: Any) -> Any:
        if kind is list:
            return self._items(value)
        if kind in PAIRS:
            return self._mapping(kind, value)
        if kind is tuple:
            return {TAG: "tuple", "v": self._items(value)}
        if kind in SETS:
            # Sorted by their JSON: the iteration order of a set differs from rank to rank.
            items = [self._hashable(".<member>", item) for item in value]
            return {TAG: SETS[kind], "v": sorted(items, key=dumps)}
        # These four stand in the values of other programs' checkpoints only.
        if kind is Encoded:
            return msgspec.Raw(value.data)
        if kind is Beside:
            return {TAG: "tensor", "v": value.name}
        if kind is Unreadable:
            return {TAG: UNREADABLE, "v": value.reason}
        if kind is Inline:
            if self._aside and _is_large(value.tensor):
                return self._beside(value.tensor, value.tensor)
            return {TAG: "tensor_data", "v": tensor_to_json(value.tensor, self._refuse)}
        entry = REGISTRY.by_type(kind)
        if entry is None:
            return self._standard(kind, value)
        try:
            plain = entry.encode(value)
        except Exception as error:
            if not is_refusal(error):
                error.add_note(f"in the encoder for {self._where()}, a {_label(kind)}")
                raise
            self._refuse(value, f"the encoder registered for it failed: {describe(error)}", error)
        return {TAG: f"@{entry.name}", "v": self.json_of(plain)}

    def _standard(self, kind: type, value: Any) -> Any:
        if is_namedtuple(kind):
            if getattr(value, "__dict__", None):
                self._refuse(
                    value, f"it has attributes besides its fields; {how_to_register(kind)}"
                )
            # Whoever holds the class can have it back: no class is made or looked up by a name.
            known = REGISTRY.learn(kind)
            if known is not kind:
                self._refuse(
                    value,
                    "another namedtuple of its name and fields is in the state; "
                    + how_to_register(kind),
                )
            fields = zip(kind._fields, value, strict=True)  # type: ignore[attr-defined]
            items = [self._at(f".{field}", field, item) for field, item in fields]
            return _apart(NAMEDTUPLE, [[kind.__name__, list(kind._fields)], items])  # type: ignore[attr-defined]
        standard = standard_of(kind)
        if standard is None:
            self._refuse(value, f"its type is unknown; {how_to_register(kind)}")
        head, body = standard.parts(value, self._refuse)
        # The body is what the value is to people: it has the path of the value.
        return _apart(standard.name, [self.json_of(head), self.json_of(body)])

    def _items(self, value: Sequence[object]) -> list[Any]:
        # Long lists are nearly always of these (the names of a group's parameters, the words of a
        # generator, a history of losses), and they need neither a walk nor a place in a message.
        if _are_themselves(value):
            return list(value)
        return [
            item if _is_itself(item) else self._at(f"[{i}]", str(i), item)
            for i, item in enumerate(value)
        ]

    def _mapping(self, kind: type, value: dict[Any, Any]) -> Any:
        plain = kind is dict and all(type(key) is str and key != TAG for key in value)
        # Keys first: the JSON of a key is part of the tensor names below it.
        keys = [self._hashable(".<key>", key) for key in value]
        items = zip(value.items(), keys, strict=True)
        pairs = [[json_key, self._entry(key, json_key, item)] for (key, item), json_key in items]
        return dict(pairs) if plain else {TAG: PAIRS[kind], "v": pairs}

    def _hashable(self, shown: str, item: object) -> Any:
        self._hashed += 1
        out = self._at(shown, "", item)
        self._hashed -= 1
        return out

    def _entry(self, key: object, json_key: Any, item: object) -> Any:
        if type(key) is str:
            shown = f".{key}" if key.isidentifier() else f"[{key!r}]"
            return self._at(shown, key, item)
        # The JSON of a key is the same on every rank; repr of a frozenset of strings is not.
        text = dumps(json_key)
        return self._at(f"[{text}]", text, item)

    def _at(self, shown: str, dotted: str, item: object) -> Any:
        # Not undone by an exception on purpose: an encoder ends with its first refusal.
        self._steps.append((shown, dotted))
        out = self.json_of(item)
        self._steps.pop()
        return out

    def _tensor(self, value: torch.Tensor) -> Any:
        if self._hashed:
            self._refuse(value, "a tensor in a set or a key has no equal, so no checkpoint of it")
        if is_wrapped(value):
            return self._wrapped(value)
        alias = check_tensor(value, self._where(), meta=self._to_fill)
        # What is one of several tensors behind one face stays with the others.
        large = _is_large(alias) and not self._suffix
        if self._tensors is None or (self._large_only and not large):
            return {TAG: "tensor_data", "v": tensor_to_json(alias, self._refuse)}
        return self._beside(value, alias)

    def _beside(self, value: torch.Tensor, alias: torch.Tensor) -> Any:
        assert self._tensors is not None  # or there is no beside
        if id(value) in self._named and not self._to_fill:
            # One name for one tensor: decoded, both places hold one tensor again.
            return self._reference(value, self._named[id(value)][1])
        name = self._free_name()
        self._tensors[name] = value if self._to_fill else alias
        self._named[id(value)] = (value, name)
        return self._reference(value, name)

    def _reference(self, value: torch.Tensor, name: str) -> Any:
        # What a wrapped tensor is made of is laid out with the whole.
        if not isinstance(value, DTensor) or self._suffix:
            return {TAG: "tensor", "v": name}
        return {TAG: "tensor", "v": name, LAYOUT: _layout_of(value)}

    def _wrapped(self, value: torch.Tensor) -> Any:
        """Write down a tensor that is several behind one face: how it is built, and of what."""
        if id(value) in self._wholes and not self._to_fill:
            return self._wholes[id(value)][1]
        inner = {}
        for suffix, tensor in pieces(value, self._where()).items():
            self._suffix = suffix
            inner[suffix] = self._tensor(tensor)
        self._suffix = ""
        node = _apart(WRAPPED, [self.json_of(how_made(value)), inner])
        self._wholes[id(value)] = (value, node)
        return node

    def _free_name(self) -> str:
        """Return a name for a tensor that lies where the walk is."""
        assert self._tensors is not None  # one without it has no names
        name = first = (
            ".".join([self._prefix, *(dotted for _, dotted in self._steps)]) + self._suffix
        )
        # Two paths may be spelled alike (a key may have a dot in it). The walk has one order, so
        # every rank and every save numbers them the same way.
        count = 0
        while name in self._tensors:
            count += 1
            name = f"{first}~{count}"
        return name

    def _where(self) -> str:
        return self._path + "".join(shown for shown, _ in self._steps)

    def _refuse(self, value: object, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise UsageError(
            f"cannot store {self._where()}, a {_label(type(value))}: {reason}",
            kind=ErrorKind.UNENCODABLE,
        ) from cause


def is_wrapped_node(node: Any) -> bool:
    """Tell whether `node` is the encoding of a tensor that is several behind one face."""
    if not isinstance(node, dict) or node.get(TAG) != f"@{RESERVED}{WRAPPED}":
        return False
    parts = node.get("v")
    return isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], dict)


def _is_large(tensor: torch.Tensor) -> bool:
    return type(tensor) is not DTensor and tensor.nbytes >= _ASIDE_BYTES


def _layout_of(value: DTensor) -> list[list[Any]]:
    """Return for each dimension of its mesh the name, and which dimension is cut along it."""
    # Exactly Shard: of a strided one its dimension does not tell how it lies.
    if not all(type(each) in (Shard, Replicate) for each in value.placements):
        return []
    names = value.device_mesh.mesh_dim_names or (None,) * value.device_mesh.ndim
    dims = (each.dim if isinstance(each, Shard) else None for each in value.placements)
    return [[name, dim] for name, dim in zip(names, dims, strict=True)]


def _is_itself(item: object) -> bool:
    kind = type(item)
    return (kind is int and -(1 << 63) <= item < 1 << 63) or (kind is str and item.isascii())  # type: ignore[operator,attr-defined]


def _are_themselves(items: Sequence[Any]) -> bool:
    """Tell whether `items` are of one kind, and each written as it is, without a call for each."""
    kinds = set(map(type, items))
    if kinds == {float}:
        return all(map(math.isfinite, items))
    if kinds == {int}:
        return bool(min(items) >= -(1 << 63) and max(items) < 1 << 63)
    return kinds == {str} and all(map(str.isascii, items))


def _apart(name: str, parts: list[Any]) -> Any:
    return {TAG: f"@{RESERVED}{name}", "v": parts}


def _label(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


# Large arrays and byte strings, whose bytes are stored beside the encoding as a tensor.


_ASIDE_BYTES = 16 * 1024
"""From here on base64 in JSON costs more than one more tensor in a plan does."""

# What a tensor can be as it is; other arrays are put aside as their bytes.
_NATIVE = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)

NDARRAY, BYTES = "ndarray", "bytes"
"""The names under which the two are stored."""


def _take_aside(value: Any, refuse: Refuse) -> tuple[str, list[Any], torch.Tensor] | None:
    """Return the name, the head and the bytes of a large value; None for any other.

    The tensor of a writable array is the array's own memory, as that of a tensor of the state is.
    """
    kind = type(value)
    if kind is bytes and len(value) >= _ASIDE_BYTES:
        # Copied: what is immutable must never be written through a tensor.
        return BYTES, [bytes_digest(value)], torch.frombuffer(bytearray(value), dtype=torch.uint8)
    if kind is np.ndarray and value.nbytes >= _ASIDE_BYTES:
        described = dtype_to_json(value.dtype, value, refuse)
        packed = np.require(value, requirements=["C", "W"])
        flat = packed.reshape(-1).view(np.uint8)
        head = [described, list(value.shape), bytes_digest(flat.data)]
        return NDARRAY, head, torch.from_numpy(packed if packed.dtype in _NATIVE else flat)
    return None


def from_aside(name: str, head: Any, body: Any) -> Any:
    """Return the value that was put aside as `name`.

    Raises:
        ValueError, TypeError: head and tensor do not belong together.
    """
    if not isinstance(body, torch.Tensor) or body.device.type != "cpu":
        raise ValueError("its bytes are no tensor")
    flat = body.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    *kind, digest = head
    # The blocks of the file were verified; this finds that another tensor took the name.
    if bytes_digest(flat.data) != digest:
        raise ValueError("its bytes are those of another value")
    if name == BYTES:
        return flat.tobytes()
    described, shape = kind
    dtype = dtype_from_json(described)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("not the shape of an array")
    if math.prod(shape) * dtype.itemsize != flat.nbytes:
        raise ValueError(f"{flat.nbytes} bytes for shape {shape} of {dtype}")
    return flat.view(dtype).reshape(shape)


# Values as bytes, and one tensor of several that is none as it lies.


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
