"""From the paths of somebody's state dict to parts and names, as the parts of a state know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError, describe
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import is_part
from dist_ckpt.state.encoding import Unreadable
from dist_ckpt.state.groups import group_name
from dist_ckpt.state.objects import encode

Path = tuple[Any, ...]

_MODEL = "model"
_OPTIMIZER_KEYS = ("state", "param_groups")
_PATH_SHOWN = 200
_VALUE = "value"  # what a part that is one Python value calls it


@dataclass(frozen=True, slots=True)
class ForeignLeaf:
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


@dataclass(slots=True)
class Placed:
    """Where the leaves went.

    Attributes:
        tensors: the tensors among the entries, by the number of the entry, in their order.
        objects: encoded Python values by part and name.
    """

    tensors: dict[int, TensorEntry] = field(default_factory=dict)
    objects: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Leaf:
    number: int
    path: Path
    entry: ForeignLeaf


def sort_into_parts(entries: Sequence[ForeignLeaf], where: str) -> Placed:
    """Sort the leaves of a state dict into parts.

    The first key of a path is the part, the others make up the name. A leaf at the top is a tensor
    of the part `model` (the state dict of a module was saved by itself) or a part of its own (a
    plain value). One key around everything, as of an `AppState`, is left away. Optimizers, in both
    forms that torch gives them, get the names that `OptimizerPart` has; any other part with Python
    values becomes the one nested value that it was.

    Args:
        entries: the leaves, each path once.
        where: the checkpoint, for messages.

    Raises:
        IntegrityError: they do not fit together.
    """
    try:
        return _placed(entries, where)
    # Paths and values are whatever the checkpoint says.
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: its entries do not fit together: {describe(error)}", kind=ErrorKind.MALFORMED
        ) from error


def _placed(entries: Sequence[ForeignLeaf], where: str) -> Placed:
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
        naming = _named(part, leaves, where)
        for number, name in naming.names.items():
            entry = entries[number]
            assert entry.dtype is not None  # only tensors are named
            named[number] = TensorEntry(part, name, entry.dtype, entry.shape)
        if naming.objects:
            objects[part] = naming.objects
    return Placed({number: named[number] for number in sorted(named)}, objects)


def _named(part: str, leaves: Sequence[_Leaf], where: str) -> _Naming:
    naming = _Naming(part, where)
    if _is_optimizer(leaves):
        try:
            naming.take_optimizer(leaves)
        except (TypeError, ValueError, LookupError):
            # Called like those of an optimizer, and something else.
            naming = _Naming(part, where)
            naming.take_value(leaves)
    elif _is_model(leaves):
        naming.take_model(leaves)
    else:
        naming.take_value(leaves)
    return naming


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
        self._encode(_VALUE, _nested(leaves))

    def _encode(self, name: str, value: Any) -> None:
        """Encode `value`, in which leaves stand for tensors."""
        leaves: dict[int, _Leaf] = {}  # by the memory of what stands in for a tensor
        found: dict[str, torch.Tensor] = {}
        path = f"{self._part}.{name}"
        filled = _filled(value, leaves)
        try:
            # Only what its files hold as tensors is read from them.
            self.objects[name] = encode(filled, path=path, tensors=found, prefix=name, aside=False)
        except UsageError as error:
            # Of no use, but no reason to refuse the rest: whoever wants it is told why.
            fault = error.message.partition("; ")[0]  # what follows is advice for who saves
            reason = f"{self._where} holds something else than plain values ({fault})"
            self.objects[name] = encode(Unreadable(_text(reason)), path=path)
            found = {}
        for inner, tensor in found.items():
            self.names[leaves.pop(tensor.data_ptr()).number] = inner
        # The tensors in it are there all the same, by the names that it would have given them.
        for leaf in leaves.values():
            self.names[leaf.number] = _joined((name, *leaf.path))


class _Groups:
    """Parameter groups, in either of the two forms."""

    def __init__(self) -> None:
        self.numbered: dict[int, dict[str, Any]] = {}
        self.flat: dict[str, dict[str, Any]] = {}

    def listed(self) -> list[dict[str, Any]]:
        """Return the groups; of the flat form those parameters together that share all options."""
        groups = [self.numbered[i] for i in sorted(self.numbered)]
        alike: dict[str, list[Any]] = {}
        for parameter, options in self.flat.items():
            # Not compared with every other one: a hostile file has as many groups as parameters.
            text = repr(sorted(options.items(), key=lambda item: item[0]))
            if text not in alike:
                alike[text] = []
                groups.append({**options, "params": alike[text]})
            alike[text].append(parameter)
        return groups


def _unwrapped(entries: Sequence[ForeignLeaf]) -> list[Path]:
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
    return _nested_at(leaves, 0)


def _nested_at(leaves: Sequence[_Leaf], depth: int) -> Any:
    if len(leaves) == 1 and len(leaves[0].path) == depth:
        return _content(leaves[0])
    below: dict[Any, list[_Leaf]] = {}
    for leaf in leaves:
        below.setdefault(leaf.path[depth], []).append(leaf)
    values = {key: _nested_at(inner, depth + 1) for key, inner in below.items()}
    # DCP takes lists apart by position, and dicts by string keys only.
    if all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values


def _filled(value: Any, leaves: dict[int, _Leaf]) -> Any:
    """Return `value` with a tensor of its own in the place of each leaf, noted in `leaves`."""
    if isinstance(value, _Leaf):
        stand_in = torch.empty(1)
        leaves[stand_in.data_ptr()] = value
        # Kept by what is returned, so no other gets the same memory meanwhile.
        return stand_in
    if type(value) is dict:
        return {key: _filled(item, leaves) for key, item in value.items()}
    if type(value) is list:
        return [_filled(item, leaves) for item in value]
    return value


def path_as_text(path: Path) -> str:
    """Return a path as a message shows it; its keys are whatever the checkpoint says."""
    text = _text(_joined(tuple(str(key)[:_PATH_SHOWN] for key in path)))[:_PATH_SHOWN]
    return "".join(c if c.isprintable() else "?" for c in text)


def _text(text: str) -> str:
    """Return `text` with a question mark for what UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()
