"""Wrapper subclasses built anew: what a checkpoint says of them beside their inner tensors.

Where the live state has such a tensor already, its inner tensors are filled and nothing is built. A
fresh optimizer has none yet. Then its class and what `__tensor_flatten__` gave beside the tensors
(the context) are needed. Nothing is imported or looked up for that: it has to be a class that the
state of this program has shown, or one of the package of the live optimizer, and nothing is called
but its `__tensor_unflatten__`. A context is made of plain values, or of enums, dataclasses and
named tuples that the module of the class has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, describe, is_refusal
from dist_ckpt.state.layout import (
    attributes_of,
    dtype_of,
    inner_of,
    is_wrapped,
    label_of,
    local_of,
    piece_of,
    shard_like,
    shown,
)
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.registry import is_namedtuple
from dist_ckpt.state.spread import cuts_of, lay_beside, shards_of

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype)
_TAG = "@"


class _Unknown(Exception):
    """A context has something that is not made of plain values."""


def how_made(value: torch.Tensor) -> dict[str, Any]:
    """Return what must be known of a wrapped tensor to build one like it: plain values."""
    local = local_of(value)
    noted = _described(local)
    noted["shape"], noted["dtype"] = list(value.shape), value.dtype
    even = not isinstance(value, DTensor) or all(
        local.shape[dim] * count == value.shape[dim] for dim, count in shards_of(value).items()
    )
    if not even:
        _forget_sizes(noted)
    # Of every dimension: which one the job that loads is cut in nobody knows now.
    noted["cuts"] = {
        str(dim): dict(cut) for dim in range(local.ndim) if (cut := cuts_of(local, dim)) is not None
    }
    return noted


def difference(ours: Mapping[str, Any], noted: Mapping[str, Any]) -> str | None:
    """Return in what two that were made so are of different kinds, None if they are of one.

    Args:
        ours: what `how_made` says of one.
        noted: what it said of the other.
    """
    told = "context" in ours and "context" in noted
    contexts = [each["context"] for each in (ours, noted)] if told else [None, None]
    if ours.get("local") != noted.get("local"):
        # Of shards of other sizes numbers differ, and shapes are compared where they are read.
        contexts = [_without_numbers(each) for each in contexts]
    if ours["class"] == noted.get("class") and contexts[0] == contexts[1]:
        return None
    one, other = (each.get("context", ["other options"])[0] for each in (noted, ours))
    return f"a {noted.get('class')} with {one!r}, and a {ours['class']} with {other!r}"


def _described(local: torch.Tensor) -> dict[str, Any]:
    _, context = local.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = attributes_of(local)
    noted: dict[str, Any] = {
        "class": label_of(type(local)),
        "attributes": {name: suffix for name, (suffix, _) in inner.items()},
        "local": list(local.shape),
    }
    if not local.is_contiguous():
        noted["stride"] = list(local.stride())
    with suppress(_Unknown):  # then it can be filled where there is one, and not be built
        noted["context"] = [_plain(context, local)]
    below = {name: _described(tensor) for name, (_, tensor) in inner.items() if is_wrapped(tensor)}
    return {**noted, "inner": below} if below else noted


def _forget_sizes(noted: dict[str, Any]) -> None:
    """Leave out what differs from shard to shard: what is noted is that of all ranks."""
    noted.pop("local")
    noted.pop("stride", None)
    if "context" in noted and _has_numbers(noted["context"]):
        del noted["context"]
    for below in noted.get("inner", {}).values():
        _forget_sizes(below)


def _plain(value: Any, local: torch.Tensor) -> Any:
    kind = type(value)
    if isinstance(value, torch.Size | list | tuple) and list(value) == list(local.shape):
        # Another shard has another shape, so this stands for that of the one that is built.
        return {_TAG: "shape", "v": kind.__name__}
    if isinstance(value, torch.Size):
        return {_TAG: "size", "v": list(value)}
    if kind is torch.device:
        # Where the saving rank had it says nothing: it will lie where its inner tensors do.
        return {_TAG: "device", "v": None}
    if isinstance(value, Enum):
        return {_TAG: "enum", "v": [label_of(kind), _plain(value.value, local)]}
    if kind in _PLAIN:
        return value
    if is_namedtuple(kind):
        return {_TAG: "named", "v": [label_of(kind), [_plain(each, local) for each in value]]}
    if kind in (list, tuple):
        items = [_plain(each, local) for each in value]
        return items if kind is list else {_TAG: "tuple", "v": items}
    if kind is dict and all(type(key) is str for key in value):
        return {_TAG: "dict", "v": {key: _plain(each, local) for key, each in value.items()}}
    if is_dataclass(value):
        content = {each.name: _plain(getattr(value, each.name), local) for each in fields(value)}
        return {_TAG: "data", "v": [label_of(kind), content]}
    raise _Unknown


def _has_numbers(node: Any) -> bool:
    if isinstance(node, dict):
        return node.get(_TAG) == "size" or any(map(_has_numbers, node.values()))
    if isinstance(node, list):
        return any(map(_has_numbers, node))
    # Which integers are sizes the class alone knows, so each of them counts as one.
    return type(node) is int


def _without_numbers(node: Any) -> Any:
    if isinstance(node, dict):
        if node.get(_TAG) in ("size", "shape"):
            return None
        return {key: _without_numbers(each) for key, each in node.items()}
    if isinstance(node, list):
        return [_without_numbers(each) for each in node]
    return None if type(node) is int else node


@dataclass(frozen=True, slots=True)
class Building:
    """One description, to build by.

    Attributes:
        noted: what `how_made` returned, as it was stored.
        where: what is built, for messages.
    """

    noted: Mapping[str, Any]
    where: str

    def suffixes(self) -> list[str]:
        """Return what comes behind the name for each inner tensor.

        Raises:
            IntegrityError: it is no such description.
        """
        try:
            torch.Size(self.noted["shape"])
            return list(_suffixes(self.noted))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise IntegrityError(
                f"stored {self.where}: what is noted of it is malformed: {describe(error)}",
                kind=ErrorKind.MALFORMED,
            ) from error

    def target(self, suffix: str, spec: TensorSpec, like: torch.Tensor) -> torch.Tensor:
        """Return an unfilled inner tensor of what stands beside `like`.

        Raises:
            IncompatibleError: it has no place in the layout of `like`.
        """
        self._class()  # before anything is read
        cuts = {int(dim): cut[suffix] for dim, cut in self.noted["cuts"].items()}
        if list(like.shape) == self.noted["shape"] or not isinstance(like, DTensor):
            self._check_sizes(tuple(local_of(like).shape))
            made = lay_beside(spec.shape, dtype_of(spec.dtype), cuts, like)
            if made is not None:
                return made
        raise self._refused(
            f"what is stored as {list(spec.shape)} has no place beside a tensor of "
            f"{list(like.shape)} that is laid out as {like.placements}"
            if isinstance(like, DTensor)
            else f"what is stored has no place beside a tensor of {list(like.shape)}"
        )

    def build(self, inner: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor that is made of `inner`, given by what comes behind its name.

        Raises:
            IncompatibleError: this program has no such class, or that refuses them.
        """
        shape = tuple(self.noted["shape"])
        carried = [each for each in inner.values() if piece_of(each) is not None]
        if not carried:
            return self._built(self.noted, inner, shape, "")
        piece, mesh = piece_of(carried[0]), carried[0].device_mesh  # type: ignore[attr-defined]
        assert piece is not None  # those without one are not carried
        here, _ = compute_local_shape_and_global_offset(shape, mesh, piece.placements)
        local = self._built(self.noted, {n: inner_of(t) for n, t in inner.items()}, here, "")
        # Of a plain tensor that is laid out so: torch would ask the class itself for a view.
        plain = torch.empty(here, dtype=local.dtype, device=local.device)
        stride = torch.empty(shape, device="meta").stride()
        like = DTensor.from_local(
            plain, mesh, piece.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return shard_like(like, local)

    def _class(self) -> Any:
        found = shown(str(self.noted["class"]))
        if found is None:
            raise self._refused(
                f"the state of this program has no {self.noted['class']}, and no class is made by "
                "its name: make the state first (one step of the optimizer), so that it has"
            )
        if "context" not in self.noted:
            raise self._refused(
                f"what a {self.noted['class']} keeps beside its tensors cannot be stored: make the "
                "state first (one step of the optimizer), so that there is one to fill"
            )
        return found

    def _check_sizes(self, here: tuple[int, ...]) -> None:
        if list(here) != self.noted.get("local") and (
            _has_numbers(self.noted["context"]) or "inner" in self.noted
        ):
            raise self._refused(
                f"a {self.noted['class']} keeps sizes beside its tensors, which are those of "
                f"{self.noted.get('local')} and not of {list(here)}: make the state first (one "
                "step of the optimizer), so that there is one to fill"
            )

    def _built(
        self, noted: Mapping[str, Any], inner: Mapping[str, Any], shape: tuple[int, ...], at: str
    ) -> torch.Tensor:
        each = Building(noted, self.where)
        cls = each._class()
        each._check_sizes(shape)
        parts = {}
        for name, suffix in noted["attributes"].items():
            below = noted.get("inner", {}).get(name)
            if below is None:
                parts[name] = inner[at + suffix]
            else:
                parts[name] = self._built(below, inner, tuple(below["local"]), at + suffix)
        first = next(iter(inner.values()))
        stride = noted.get("stride") or torch.empty(shape, device="meta").stride()
        try:
            with torch.no_grad():
                context = _context(noted["context"][0], cls, shape, first.device)
                built = cls.__tensor_unflatten__(parts, context, torch.Size(shape), tuple(stride))
                same = isinstance(built, cls) and tuple(built.shape) == tuple(shape)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise self._refused(f"a {noted['class']} refused it: {describe(error)}") from error
        if not same:
            raise self._refused(f"a {noted['class']} made something else of it")
        made: torch.Tensor = built
        return made

    def _refused(self, why: str) -> IncompatibleError:
        return IncompatibleError(f"{self.where}: {why}", kind=ErrorKind.STATE_MISMATCH)


def rebuilt(like: torch.Tensor, inner: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor of the class and context of `like`, made of other inner tensors."""
    local = local_of(like)
    made = remade(local, {suffix: inner_of(tensor) for suffix, tensor in inner.items()})
    return made if not isinstance(like, DTensor) else shard_like(like, made)


def remade(local: torch.Tensor, inner: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor of the class and context of `local`, made of others than `leaves_of` has."""
    return _rebuilt(local, inner, "")


def _rebuilt(local: torch.Tensor, inner: Mapping[str, torch.Tensor], at: str) -> torch.Tensor:
    _, context = local.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {
        name: _rebuilt(tensor, inner, at + suffix) if is_wrapped(tensor) else inner[at + suffix]
        for name, (suffix, tensor) in attributes_of(local).items()
    }
    cls: Any = type(local)
    with torch.no_grad():
        made: torch.Tensor = cls.__tensor_unflatten__(parts, context, local.shape, local.stride())
    return made


def _suffixes(noted: Mapping[str, Any]) -> Iterator[str]:
    for name, suffix in noted["attributes"].items():
        below = noted.get("inner", {}).get(name)
        if below is None:
            yield suffix
        else:
            yield from (suffix + each for each in _suffixes(below))


def _context(node: Any, cls: type, shape: tuple[int, ...], device: torch.device) -> Any:
    """Return the context that `_plain` made `node` of."""

    def value_of(node: Any) -> Any:
        if isinstance(node, list):
            return [value_of(each) for each in node]
        if not isinstance(node, dict):
            return node
        tag, body = node[_TAG], node["v"]
        if tag == "shape":
            return {"Size": torch.Size, "list": list, "tuple": tuple}[body](shape)
        if tag == "size":
            return torch.Size(body)
        if tag == "device":
            return device
        if tag == "tuple":
            return tuple(map(value_of, body))
        if tag == "dict":
            return {key: value_of(each) for key, each in body.items()}
        label, content = body
        kind: Any = _data_class(label, cls)
        if tag == "enum" and issubclass(kind, Enum):
            return kind(value_of(content))
        if tag == "named" and is_namedtuple(kind):
            return kind._make(map(value_of, content))
        if tag == "data" and is_dataclass(kind):
            # Not called: what is read runs no `__init__`. And a frozen class refuses to be set.
            made: Any = object.__new__(kind)  # type: ignore[arg-type]
            for each in fields(kind):
                object.__setattr__(made, each.name, value_of(content[each.name]))
            return made
        raise ValueError(f"{label} is no {tag}")

    return value_of(node)


def _data_class(label: str, cls: type) -> Any:
    """Return the enum, dataclass or named tuple that the module of `cls`, or of a base, knows."""
    for base in cls.__mro__:
        home = sys.modules.get(base.__module__)
        for value in list(vars(home).values()) if home is not None else ():
            data = isinstance(value, type) and (
                issubclass(value, Enum) or is_dataclass(value) or is_namedtuple(value)
            )
            if data and label_of(value) == label:
                return value
    raise ValueError(f"{label} is no class of plain values that {cls.__module__} knows")
