"""The state of optimizers as other programs have it: nested, flat, numbered, several of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.errors import CheckpointError
from dist_ckpt.foreign.leaves import PartLeaf, content, dotted
from dist_ckpt.state.decoding import decode, may_refer, references, references_aside
from dist_ckpt.state.encoding import Beside, Encoded, Inline

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
