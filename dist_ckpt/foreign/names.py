"""From the paths of somebody's state dict to parts and names, as the parts of a state know them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError, describe
from dist_ckpt.foreign.leaves import ForeignLeaf, PartLeaf, Path, dotted, nested_at
from dist_ckpt.foreign.optimizers import (
    OPTIMIZER_KEYS,
    StoredOptimizer,
    find_optimizers,
    is_optimizer_name,
    with_numbers,
)
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import is_part
from dist_ckpt.state.encoding import Encoded, Unreadable, encode, wrapped_as_json
from dist_ckpt.state.optimizer_content import MADE, group_name
from dist_ckpt.state.value_fit import VALUE

_MODEL = "model"
MODELS = (
    _MODEL,
    *("model_state_dict", "state_dict", "model_state", "module", "net", "network"),
)
"""What programs call the state dict of their model in a dict of several."""

# Lists of as many as there are optimizers: Lightning has one also of a single one.
_SCHEDULERS = ("lr_schedulers", "schedulers")
_PATH_SHOWN = 200


@dataclass(slots=True)
class Placed:
    """Where the leaves went.

    Attributes:
        tensors: the tensors among the entries, by the number of the entry, in their order.
        objects: encoded Python values by part and name.
    """

    tensors: dict[int, TensorEntry] = field(default_factory=dict)
    objects: dict[str, dict[str, bytes]] = field(default_factory=dict)


def sort_into_parts(
    entries: Sequence[ForeignLeaf],
    where: str,
    *,
    guessed: bool = False,
    whole: Collection[str] = (),
) -> Placed:
    """Sort the leaves of a state dict into parts.

    The first key of a path is the part, the others make up the name. A leaf at the top is a part of
    its own (a plain value, or a tensor beside a model), or else a tensor of the part `model` (the
    state dict of a module was saved by itself). A key around the parts, as of an `AppState`, is
    left away, and the state dict of an optimizer that was saved by itself is the part `optimizer`.
    Optimizers, in all forms that torch gives them, get the names that `OptimizerPart` has; any
    other part with Python values becomes the one nested value that it was.

    Args:
        entries: the leaves, each path once.
        where: the checkpoint, for messages.
        guessed: whether the second key of a path is a name, perhaps of several keys.
        whole: parts that are one value each, though they look like a module or an optimizer: what
            takes them is given what it was.

    Raises:
        IntegrityError: they do not fit together.
    """
    try:
        paths = unwrapped(entries, guessed=guessed, whole=whole)
        return _placed(entries, paths, where, whole)
    # Paths and values are whatever the checkpoint says.
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: its entries do not fit together: {describe(error)}", kind=ErrorKind.MALFORMED
        ) from error


def _placed(
    entries: Sequence[ForeignLeaf], paths: Sequence[Path], where: str, whole: Collection[str]
) -> Placed:
    parts: dict[str, list[PartLeaf]] = {}
    beside_model = any(len(path) > 1 and path[0] in MODELS for path in paths)
    for number, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        alone = len(path) == 1 and path[0] not in whole
        if alone and entry.dtype is not None and not beside_model:
            part, rest = _MODEL, path
        else:
            part, rest = str(path[0]), path[1:]
        if not is_part(part):
            part, rest = "state", path
        parts.setdefault(part, []).append(PartLeaf(number, rest, entry))
    named: dict[int, TensorEntry] = {}
    objects: dict[str, dict[str, bytes]] = {}
    for part, leaves in parts.items():
        naming = _named(part, leaves, where, whole=part in whole)
        for number, name in naming.names.items():
            entry = entries[number]
            assert entry.dtype is not None  # only tensors are named
            named[number] = TensorEntry(part, name, entry.dtype, entry.shape)
        if naming.objects:
            objects[part] = naming.objects
    return Placed({number: named[number] for number in sorted(named)}, objects)


def _named(part: str, leaves: Sequence[PartLeaf], where: str, *, whole: bool) -> _Naming:
    naming = _Naming(part, where)
    if whole:
        naming.take_value(leaves)
        return naming
    try:
        optimizers = find_optimizers(leaves)
    except (TypeError, ValueError, LookupError):
        optimizers = {}  # called like those of an optimizer, and something else
    if optimizers:
        for prefix, found in optimizers.items():
            naming.take_optimizer(prefix, found)
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

    def take_model(self, leaves: Sequence[PartLeaf]) -> None:
        for leaf in leaves:
            name = dotted(leaf.path)
            if leaf.entry.dtype is None:
                self._encode(name, leaf.entry.value)
            else:
                self.names[leaf.number] = name

    def take_optimizer(self, prefix: str, found: StoredOptimizer) -> None:
        made: dict[str, Any] = {}
        for name, content in found.state.items():
            if isinstance(content, PartLeaf) and content.entry.dtype is not None:
                self.names[content.number] = prefix + name
                if content.entry.made is not None:
                    suffix, noted = content.entry.made
                    made[prefix + name.removesuffix(suffix)] = noted
            else:
                self._encode(prefix + name, content)
        for i, group in enumerate(found.groups):
            # Notes of all groups count together.
            group = {**group, MADE: made} if made and i == 0 else group
            self._encode(prefix + group_name(i, group["params"]), group)
        for key, content in found.further.items():
            self._encode(f"{prefix}own.{key}", {"key": key, "value": content})

    def take_value(self, leaves: Sequence[PartLeaf]) -> None:
        value = with_numbers(nested_at(self._wholes(leaves), 0))
        if self._part in _SCHEDULERS and type(value) is list and len(value) == 1:
            (value,) = value
        self._encode(VALUE, value)

    def _wholes(self, leaves: Sequence[PartLeaf]) -> list[PartLeaf]:
        """Return `leaves` with one in the place of those that one tensor is made of."""
        rest: list[PartLeaf] = []
        inner: dict[Path, dict[str, PartLeaf]] = {}
        for leaf in leaves:
            if leaf.entry.made is None:
                rest.append(leaf)
                continue
            suffix = leaf.entry.made[0]
            path = (*leaf.path[:-1], str(leaf.path[-1]).removesuffix(suffix))
            inner.setdefault(path, {})[suffix] = leaf
        for path, mine in inner.items():
            names = {suffix: dotted((VALUE, *path)) + suffix for suffix in mine}
            self.names.update((leaf.number, names[suffix]) for suffix, leaf in mine.items())
            first = next(iter(mine.values()))
            assert first.entry.made is not None  # or it would be among the rest
            data = wrapped_as_json(first.entry.made[1], names, path=f"{self._part}.{dotted(path)}")
            whole = ForeignLeaf(path, None, (), Encoded(data))
            rest.append(PartLeaf(first.number, path, whole))
        return rest

    def _encode(self, name: str, value: Any) -> None:
        """Encode `value`, in which leaves stand for tensors."""
        leaves: dict[int, PartLeaf] = {}  # by the memory of what stands in for a tensor
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
            self.names[leaf.number] = dotted((name, *leaf.path))


def _is_model(leaves: Sequence[PartLeaf]) -> bool:
    return all(
        leaf.path and (leaf.entry.dtype is not None or _is_extra_state(str(leaf.path[-1])))
        for leaf in leaves
    )


def _is_extra_state(name: str) -> bool:
    # Megatron-Core has a piece of it for each layer, `/shard_0_4` and so on.
    return name.partition("/")[0].endswith("_extra_state")


def _filled(value: Any, leaves: dict[int, PartLeaf]) -> Any:
    """Return `value` with a tensor of its own in the place of each leaf, noted in `leaves`."""
    if isinstance(value, PartLeaf):
        stand_in = torch.empty(1)
        leaves[stand_in.data_ptr()] = value
        # Kept by what is returned, so no other gets the same memory meanwhile.
        return stand_in
    if type(value) is dict:
        return {key: _filled(item, leaves) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(item, leaves) for item in value)
    return value


def path_as_text(path: Path) -> str:
    """Return a path as a message shows it; its keys are whatever the checkpoint says."""
    text = _text(dotted(tuple(str(key)[:_PATH_SHOWN] for key in path)))[:_PATH_SHOWN]
    return "".join(c if c.isprintable() else "?" for c in text)


def _text(text: str) -> str:
    """Return `text` with a question mark for what UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()


# Keys around the parts of a state dict, which are left away, and one that is missing.


_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler"
_SCHEDULER_KEYS = ("last_epoch", "_step_count")


def unwrapped(
    entries: Sequence[ForeignLeaf], *, guessed: bool, whole: Collection[str] = ()
) -> list[Path]:
    """Return the paths of `entries` as they lie in a dict of parts.

    Args:
        entries: the leaves.
        guessed: whether the second key of a path is a name, perhaps of several keys.
        whole: what is a part for certain, whatever lies in it.
    """
    paths = [entry.path for entry in entries]
    names = [dotted(path).split(".") for path in paths]
    if all(map(is_optimizer_name, names)) and any(name[0] == "param_groups" for name in names):
        return [(_OPTIMIZER, *path) for path in paths]  # it was saved by itself
    if {path[0] for path in paths}.issuperset(_SCHEDULER_KEYS):
        return [(_SCHEDULER, *path) for path in paths]  # and so was this
    cut = [_cut(path) for path in paths] if guessed else paths
    tops: dict[Any, list[Path]] = {}
    for path in cut:
        tops.setdefault(path[0], []).append(path)
    outer = {
        top
        for top, mine in tops.items()
        if top not in whole and _is_around(mine, doubtful=guessed or len(tops) > 1)
    }
    inner = [path[1] for top in outer for path in tops[top]]
    if len(outer) != 1 or not (tops.keys() - outer).isdisjoint(map(str, inner)):
        return paths
    return [
        inner[1:] if inner[0] in outer else path for path, inner in zip(paths, cut, strict=True)
    ]


def _cut(path: Path) -> Path:
    """Return a path of two keys with the first component of the second set apart."""
    if len(path) != 2 or type(path[1]) is not str:
        return path
    return (path[0], *path[1].split(".", 1))


def _is_around(paths: Sequence[Path], *, doubtful: bool) -> bool:
    """Tell whether the first key of `paths`, the same in all, lies around parts.

    Args:
        paths: all that it begins.
        doubtful: whether it may be a part itself, and must prove to be none.
    """
    if not all(len(path) > 1 for path in paths):
        return False
    inner = {path[1] for path in paths}
    # An optimizer beside something else: alone it may be one of several.
    optimizers = {path[1] for path in paths if dotted(path[2:]).split(".")[0] == "param_groups"}
    if optimizers and inner - optimizers and optimizers.isdisjoint(OPTIMIZER_KEYS):
        return True
    deep = all(len(path) > 2 for path in paths)
    return deep and not doubtful and not inner.issubset(OPTIMIZER_KEYS)
