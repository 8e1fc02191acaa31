"""From the paths of somebody's state dict to parts and names, as the parts of a state know them.

The state of an optimizer has many forms there: nested, flat, numbered, several of them in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError, UsageError, describe
from dist_ckpt.foreign.leaves import ForeignLeaf, PartLeaf, Path, content, dotted, nested_at
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import is_part
from dist_ckpt.state.decoding import decode, may_refer, references, references_aside
from dist_ckpt.state.encoding import Beside, Encoded, Inline, Unreadable, encode, wrapped_as_json
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
        # A key of others may be anything: what no part can be called goes together into one.
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
    # In the order of the entries, whatever the order of the parts: both sides count by it.
    return Placed({number: named[number] for number in sorted(named)}, objects)


def _named(part: str, leaves: Sequence[PartLeaf], where: str, *, whole: bool) -> _Naming:
    naming = _Naming(part, where)
    # A part of this name takes one value, also where that looks like a model.
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
        for name, value in found.state.items():
            if isinstance(value, PartLeaf) and value.entry.dtype is not None:
                self.names[value.number] = prefix + name
                if value.entry.made is not None:
                    suffix, noted = value.entry.made
                    made[prefix + name.removesuffix(suffix)] = noted
            else:
                self._encode(prefix + name, value)
        for i, group in enumerate(found.groups):
            # Notes of all groups count together.
            group = {**group, MADE: made} if made and i == 0 else group
            self._encode(prefix + group_name(i, group["params"]), group)
        for key, value in found.further.items():
            self._encode(f"{prefix}own.{key}", {"key": key, "value": value})

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
    # Around can be but one key, and nothing beside it that is called as something inside.
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


# The state of optimizers as other programs have it.


_STATE, _GROUPS = "state", "param_groups"
OPTIMIZER_KEYS = (_STATE, _GROUPS)
# Of several in a list or a dict each has the names that one beside others has.
_BESIDE = "beside"

_Item = tuple[list[str], Any]
"""Where something lies, by the components of its name, and what: a `PartLeaf` for a tensor."""


@dataclass(slots=True)
class StoredOptimizer:
    """What is stored of one optimizer.

    Attributes:
        state: by name, `state.<parameter>.<key>`; a `PartLeaf` for a tensor.
        groups: its groups; in each `params` lists names, or numbers.
        further: what else lies beside the two.
    """

    state: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    further: dict[str, Any] = field(default_factory=dict)


def find_optimizers(leaves: Sequence[PartLeaf]) -> dict[str, StoredOptimizer]:
    """Return the optimizers that a part is made of, by the prefix of their names.

    That is one, without a prefix, or the members of a list or dict of them; none where there is
    anything else.

    Raises:
        ValueError: it is called like an optimizer, and is none; so is TypeError.
    """
    items = [item for leaf in leaves for item in _expanded(leaf)]
    if _is_one(items):
        return {"": _read(items)}
    several: dict[str, list[_Item]] = {}
    for (first, *rest), what in ((components or [""], what) for components, what in items):
        several.setdefault(first, []).append((rest, what))
    if not all(_is_one(each) for each in several.values()):
        return {}
    return {f"{_BESIDE}.{key}.": _read(each) for key, each in several.items()}


def is_optimizer_name(components: Sequence[str]) -> bool:
    """Tell whether a name with these components may be one of an optimizer."""
    return bool(components) and components[0] in OPTIMIZER_KEYS


def plain(value: Any) -> Any:
    """Return `value`, decoded where it is an encoding that can be."""
    if not isinstance(value, Encoded):
        return value
    try:
        # None of them is read to see what it is in, but for arrays and byte strings.
        stand_ins: dict[str, torch.Tensor] = {}
        tensors: Mapping[str, torch.Tensor] = {}
        if may_refer(value.data):
            inside = references_aside(value.data)
            stay = set(references(value.data)).difference(inside)
            stand_ins = {name: torch.empty(0, device="meta") for name in stay}
            tensors = stand_ins | {name: value.tensors[name] for name in inside}
        found = decode(value.data, tensors=tensors)
    except (CheckpointError, KeyError):
        return value  # whoever wants it is told why
    return _undecoded(found, {id(tensor): name for name, tensor in stand_ins.items()})


def with_numbers(value: Any) -> Any:
    """Return `value` with numbers for the parameters of the optimizers in it, where they had any.

    DCP makes texts of the keys below `state`; what the groups list says what they were.
    """
    if type(value) in (list, tuple):
        return type(value)(with_numbers(item) for item in value)
    if type(value) is not dict:
        return value
    found = {key: with_numbers(item) for key, item in value.items()}
    state, groups = found.get(_STATE), plain(found.get(_GROUPS))
    if type(state) is dict and type(groups) is list:
        numbers = {str(number): number for group in groups for number in _listed(group)}
        # A key that no group lists stays what it is: a text.
        found[_STATE] = {numbers.get(key, key): item for key, item in state.items()}
    return found


def _listed(group: Any) -> list[int]:
    members = plain(group)
    listed = plain(members.get("params")) if type(members) is dict else None
    numbers = [plain(each) for each in listed] if type(listed) is list else []
    return [each for each in numbers if type(each) is int]


def _undecoded(value: Any, stand_ins: Mapping[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        return Beside(stand_ins[id(value)]) if id(value) in stand_ins else Inline(value)
    if type(value) in (list, tuple):
        return type(value)(_undecoded(item, stand_ins) for item in value)
    if type(value) is dict:
        return {key: _undecoded(item, stand_ins) for key, item in value.items()}
    return value


def _expanded(leaf: PartLeaf) -> Iterator[_Item]:
    """Yield a leaf, or what is in it where it is a whole optimizer or all of the state of one."""
    components = dotted(leaf.path).split(".") if leaf.path else []
    if leaf.entry.dtype is not None:
        yield components, leaf
    else:
        yield from _inside(components, leaf.entry.value)


def _inside(components: list[str], value: Any) -> Iterator[_Item]:
    found = plain(value)
    members: Any = ()
    if type(found) is dict:
        members = found.items()
    elif type(found) is list:
        members = enumerate(found)
    if _is_whole(found):
        for key, item in members:
            yield from _inside([*components, str(key)], item)
    elif components and components[-1] == _STATE and type(found) is dict:
        for owner, entry in members:
            here = [*components, str(owner)]
            if type(entry) is dict:
                yield from (([*here, str(key)], item) for key, item in entry.items())
            else:
                yield here, entry
    # At the top or one below: there a program keeps several optimizers in a list or dict.
    elif len(components) < 2 and members and all(_is_whole(item) for _, item in members):
        for key, item in members:
            yield from _inside([*components, str(key)], item)
    else:
        yield components, value


def _is_whole(value: Any) -> bool:
    """Tell whether `value` is what `state_dict` of an optimizer returned."""
    return (
        type(value) is dict
        and isinstance(value.get(_STATE), dict)
        and isinstance(value.get(_GROUPS), list)
    )


def _is_one(items: Sequence[_Item]) -> bool:
    return any(components[:1] == [_GROUPS] for components, _ in items)


def _read(items: Sequence[_Item]) -> StoredOptimizer:
    found = StoredOptimizer()
    groups = _Groups(
        {c[1] for c, _ in items if len(c) == 3 and (c[0], c[2]) == (_GROUPS, "params")}
    )
    for components, what in items:
        if components[0] == _GROUPS:
            groups.take(components[1:], what)
        elif components[0] == _STATE:
            found.state[".".join(components)] = what
        else:
            found.further[".".join(components)] = what
    if any(isinstance(what, PartLeaf) for what in found.further.values()):
        raise ValueError("it has tensors beside its state")
    found.groups = groups.listed()
    for group in found.groups:
        listed = group["params"]
        # Names or numbers, by exact type: nothing else tells a parameter.
        if not isinstance(listed, list) or len(set(map(type, listed)) - {int, str}):
            raise ValueError("a group of it does not list its parameters")
    return found


class _Groups:
    """Parameter groups, in either of the two forms.

    Args:
        numbered: the numbers of those that list their parameters.
    """

    def __init__(self, numbered: set[str]) -> None:
        self._keys = numbered
        self._numbered: dict[int, dict[str, Any]] = {}
        self._flat: dict[str, dict[str, Any]] = {}

    def take(self, components: list[str], what: Any) -> None:
        """Take an entry below `param_groups`, or all of them."""
        value = content(what) if isinstance(what, PartLeaf) else plain(what)
        if not components:
            if not isinstance(value, list):
                raise ValueError("its groups are no list")
            # Copies, as options may be added to a group below.
            self._numbered |= {i: dict(group) for i, group in enumerate(value)}
        elif components[0] in self._keys:
            at = self._numbered.setdefault(int(components[0]), {})
            for key in components[1:-1]:  # an option that was taken apart
                at = at.setdefault(key, {})
            at[components[-1]] = value
        else:
            parameter, option = ".".join(components[:-1]), components[-1]
            self._flat.setdefault(parameter, {})[option] = value

    def listed(self) -> list[dict[str, Any]]:
        """Return the groups; of the flat form, which does not say which there were, one for each.

        Whoever has several of them in one group finds that all have the same options.
        """
        flat = [{**options, "params": [name]} for name, options in self._flat.items()]
        return [*(self._numbered[i] for i in sorted(self._numbered)), *flat]
