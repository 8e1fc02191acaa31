"""From the paths of somebody's state dict to parts and names, as the parts of a state know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import is_part
from dist_ckpt.state.decoding import UNREADABLE
from dist_ckpt.state.encoding import TAG
from dist_ckpt.state.groups import group_name
from dist_ckpt.state.objects import encode

Path = tuple[Any, ...]

_MODEL = "model"
_OPTIMIZER_KEYS = ("state", "param_groups")
_VALUE = "value"  # what a part that is one Python value calls it


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf of a state dict.

    Attributes:
        path: the keys that lead to it.
        dtype: of a tensor, None for a Python value.
        shape: of a tensor.
        value: the Python value.
    """

    path: Path
    dtype: str | None
    shape: tuple[int, ...] = ()
    value: Any = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that only a program which executes pickles could read."""

    reason: str


@dataclass(slots=True)
class Placed:
    """Where the leaves went.

    Attributes:
        tensors: the tensors among the entries, in their order.
        objects: encoded Python values by part and name.
    """

    tensors: list[TensorEntry] = field(default_factory=list)
    objects: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Leaf:
    number: int
    path: Path
    entry: Entry


def place(entries: Sequence[Entry], where: str) -> Placed:
    """Sort the leaves of a state dict into parts.

    The first key of a path is the part, the others make up the name. A leaf at the top is a tensor
    of the part `model` (the state dict of a module was saved by itself) or a part of its own (a
    plain value). One key around everything, as of an `AppState`, is left away. Optimizers, in both
    forms that torch gives them, get the names that `OptimizerPart` has; any other part with Python
    values becomes the one nested value that it was.

    Args:
        entries: the leaves, each path once.
        where: the checkpoint, for messages.
    """
    parts: dict[str, list[_Leaf]] = {}
    for number, (path, entry) in enumerate(zip(_unwrapped(entries), entries, strict=True)):
        if len(path) == 1 and entry.dtype is not None:
            part, rest = _MODEL, path
        else:
            part, rest = str(path[0]), path[1:]
        if not is_part(part):
            part, rest = "state", path
        parts.setdefault(part, []).append(_Leaf(number, rest, entry))
    named: dict[int, TensorEntry] = {}
    objects: dict[str, dict[str, bytes]] = {}
    for part, leaves in parts.items():
        naming = _Naming(part, where)
        if _is_optimizer(leaves):
            naming.take_optimizer(leaves)
        elif _is_model(leaves):
            naming.take_model(leaves)
        else:
            naming.take_value(leaves)
        for number, name in naming.names.items():
            entry = entries[number]
            assert entry.dtype is not None  # only tensors are named
            named[number] = TensorEntry(part, name, entry.dtype, entry.shape)
        if naming.objects:
            objects[part] = naming.objects
    return Placed([named[number] for number in sorted(named)], objects)


class _Naming:
    """Names of the tensors, and the encoded values, of one part."""

    def __init__(self, part: str, where: str) -> None:
        self._part = part
        self._where = where
        self.names: dict[int, str] = {}
        self.objects: dict[str, bytes] = {}

    def take_model(self, leaves: Sequence[_Leaf]) -> None:
        for leaf in leaves:
            name = _joined(leaf.path)
            if leaf.entry.dtype is None:
                self._encode(name, leaf.entry.value)
            else:
                self.names[leaf.number] = name

    def take_optimizer(self, leaves: Sequence[_Leaf]) -> None:
        groups = _Groups()
        for leaf in leaves:
            name = _joined(leaf.path)
            if name == "param_groups":  # as one value
                for i, group in enumerate(leaf.entry.value):
                    groups.numbered[i] = dict(group)
            elif leaf.path[0] == "param_groups":
                groups.numbered.setdefault(leaf.path[1], {})[leaf.path[2]] = _content(leaf)
            elif name.startswith("param_groups."):
                parameter, _, option = name.removeprefix("param_groups.").rpartition(".")
                groups.flat.setdefault(parameter, {})[option] = _content(leaf)
            elif leaf.entry.dtype is None:
                self._encode(name, leaf.entry.value)
            else:
                self.names[leaf.number] = name
        for i, group in enumerate(groups.listed()):
            self._encode(group_name(i, group["params"]), group)

    def take_value(self, leaves: Sequence[_Leaf]) -> None:
        if [leaf.path for leaf in leaves] == [()]:
            self._encode(_VALUE, _content(leaves[0]))
        else:
            self._encode(_VALUE, _nested(leaves))

    def _encode(self, name: str, value: Any) -> None:
        """Encode `value`, in which leaves stand for tensors."""
        numbers: dict[int, int] = {}  # by the memory of what stands in for a tensor
        found: dict[str, torch.Tensor] = {}
        path = f"{self._part}.{name}"
        try:
            data = encode(_filled(value, numbers), path=path, tensors=found, prefix=name)
        except UsageError as error:
            # Of no use, but no reason to refuse the rest: whoever wants it is told why.
            fault = error.message.partition("; ")[0]  # what follows is advice for who saves
            reason = f"{self._where} holds something else than plain values ({fault})"
            data = msgspec.json.encode({TAG: UNREADABLE, "v": reason})
            found = {}
        self.objects[name] = data
        for inner, tensor in found.items():
            number = numbers.get(tensor.data_ptr())
            if number is not None:
                self.names[number] = inner


class _Groups:
    """Parameter groups, in either of the two forms."""

    def __init__(self) -> None:
        self.numbered: dict[int, dict[str, Any]] = {}
        self.flat: dict[str, dict[str, Any]] = {}

    def listed(self) -> list[dict[str, Any]]:
        """Return the groups; of the flat form those parameters together that share all options."""
        groups = [self.numbered[i] for i in sorted(self.numbered)]
        for parameter, options in self.flat.items():
            for group in groups:
                if {key: value for key, value in group.items() if key != "params"} == options:
                    group["params"].append(parameter)
                    break
            else:
                groups.append({**options, "params": [parameter]})
        return groups


def _unwrapped(entries: Sequence[Entry]) -> list[Path]:
    paths = [entry.path for entry in entries]
    tops = {path[0] for path in paths}
    inner = {path[1] for path in paths if len(path) > 1}
    deep = all(len(path) > 2 for path in paths)
    if len(tops) == 1 and deep and not inner.issubset(_OPTIMIZER_KEYS):
        return [path[1:] for path in paths]
    return paths


def _is_optimizer(leaves: Sequence[_Leaf]) -> bool:
    names = [_joined(leaf.path) for leaf in leaves]
    grouped = any(name == "param_groups" or name.startswith("param_groups.") for name in names)
    return grouped and all(name.startswith(_OPTIMIZER_KEYS) for name in names)


def _is_model(leaves: Sequence[_Leaf]) -> bool:
    return all(
        leaf.path and (leaf.entry.dtype is not None or str(leaf.path[-1]).endswith("_extra_state"))
        for leaf in leaves
    )


def _joined(path: Path) -> str:
    return ".".join(map(str, path))


def _content(leaf: _Leaf) -> Any:
    return leaf if leaf.entry.dtype is not None else leaf.entry.value


def _nested(leaves: Sequence[_Leaf]) -> Any:
    """Return the value that was taken apart into `leaves`."""
    if len(leaves) == 1 and not leaves[0].path:
        return _content(leaves[0])
    below: dict[Any, list[_Leaf]] = {}
    for leaf in leaves:
        below.setdefault(leaf.path[0], []).append(_Leaf(leaf.number, leaf.path[1:], leaf.entry))
    values = {key: _nested(inner) for key, inner in below.items()}
    # DCP takes lists apart by position, and dicts by string keys only.
    if all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values


def _filled(value: Any, numbers: dict[int, int]) -> Any:
    """Return `value` with a tensor of its own in the place of each leaf."""
    if isinstance(value, _Leaf):
        stand_in = torch.empty(1)
        numbers[stand_in.data_ptr()] = value.number
        # Kept by what is returned, so no other gets the same memory meanwhile.
        return stand_in
    if isinstance(value, Unreadable):
        raise UsageError(value.reason)
    if type(value) is dict:
        return {key: _filled(item, numbers) for key, item in value.items()}
    if type(value) is list:
        return [_filled(item, numbers) for item in value]
    return value
