"""Which stored parameter group is which live one: pure decisions over names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.format.files import bytes_digest
from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import dumps
from dist_ckpt.state.model import ModelPart

PREFIX = "param_groups"
MARK = "@"
MADE = f"{MARK}made"
"""The note of how what is several tensors behind one face is built of these."""

"""What the keys of a stored group begin with that are no options but notes about its state."""

# How a live group lists its parameters; everything else in it is an option.
_STRUCTURE = frozenset({"params", "param_names"})


def group_name(index: int, parameters: Sequence[str]) -> str:
    """Return what the group at `index` is called in a checkpoint.

    By its first parameter, so that ranks that hold different groups never share a name.
    """
    return f"{PREFIX}.{parameters[0]}" if parameters else f"{PREFIX}[{index}]"


def is_group_name(name: str) -> bool:
    """Tell whether `group_name` may have made `name`."""
    return name.startswith((f"{PREFIX}.", f"{PREFIX}["))


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, live or stored: no parameters, no notes."""
    return {
        key: value
        for key, value in group.items()
        if key not in _STRUCTURE and not str(key).startswith(MARK)
    }


def options_digest(data: bytes) -> str:
    """Return a digest of the options in an encoded group: of what its members have in common."""
    return bytes_digest(dumps(options_of(parse_document(data, PREFIX))).encode())


@dataclass(frozen=True)
class GroupMatch:
    """The stored name of each live group that has one, and the names that have no partner.

    Attributes:
        stored_of: by live group name, from which its options come: each of its parameters was
            saved with just these.
        missing: live groups, or `group[parameter]` where a group of that name has others.
        unexpected: stored ones, likewise; `group[parameter]` also where another rank may have
            that parameter.
    """

    stored_of: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def _never(first: str, second: str) -> bool:
    return False


def match_groups(
    live: Mapping[str, Sequence[str]],
    stored: Mapping[str, Sequence[str]],
    *,
    alike: Callable[[str, str], bool] = _never,
) -> GroupMatch:
    """Match live groups to stored ones, each given as name to canonical parameter names.

    A group of one stage of a pipeline is a piece of what another layout has as one group. So a
    live group may be a piece of a stored one, or be made of pieces of several that are `alike`. A
    stored group is never shared by two live ones: whoever split it wants other options.

    Args:
        live: the groups of this rank.
        stored: those of all ranks that saved.
        alike: tells whether two stored groups have equal options.
    """
    match = GroupMatch(_same_members(live, stored))
    taken = set(match.stored_of.values())
    owner = {parameter: name for name, params in stored.items() for parameter in params}
    for name, params in live.items():
        if name in match.stored_of or not params or not owner.keys() >= set(params):
            continue
        first, *others = dict.fromkeys(owner[parameter] for parameter in params)
        if taken.isdisjoint((first, *others)) and all(alike(first, each) for each in others):
            match.stored_of[name] = first
            taken.update((first, *others))
            rest = {p: each for each in (first, *others) for p in stored[each]}
            match.unexpected.extend(f"{rest[p]}[{p}]" for p in rest if p not in set(params))
    for name, source in match.stored_of.items():
        # What other ranks had of the same group says nothing more.
        mine = set(live[name])
        taken.update(
            each
            for each, params in stored.items()
            if params and mine.issuperset(params) and alike(source, each)
        )
    _tell_unmatched(match, live, {n: params for n, params in stored.items() if n not in taken})
    return match


def _same_members(
    live: Mapping[str, Sequence[str]], stored: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return by live name the stored groups of just the same parameters."""
    # An optimizer has each parameter in one group only, so a set of them is an identity.
    by_parameters = {frozenset(params): name for name, params in stored.items() if params}
    same: dict[str, str] = {}
    for name, params in live.items():
        found = by_parameters.get(frozenset(params))
        # Empty groups have nothing but their place to be known by. And of two that list the same
        # in another order, that of the rank counts which has this order.
        if name in stored and set(stored[name]) == set(params):
            found = name
        if found is not None:
            same[name] = found
    return same


def _tell_unmatched(
    match: GroupMatch, live: Mapping[str, Sequence[str]], loose: dict[str, Sequence[str]]
) -> None:
    for name, params in live.items():
        if name in match.stored_of:
            continue
        # A group of the same name but with other parameters: say which, not just that.
        if name in loose:
            other = loose.pop(name)
            match.missing.extend(f"{name}[{p}]" for p in params if p not in set(other))
            match.unexpected.extend(f"{name}[{p}]" for p in other if p not in set(params))
        else:
            match.missing.append(name)
    match.unexpected.extend(loose)


# The parameters and groups of an optimizer, by name.


STATE = "state."


@dataclass(frozen=True)
class View:
    """One optimizer as it is now.

    Attributes:
        prefix: what all its names begin with; empty for the only one of its part.
        parameters: by name, in the order of the groups.
        groups: the live groups by name.
        members: by group, the names of its parameters.
    """

    prefix: str
    parameters: dict[str, torch.Tensor]
    groups: dict[str, dict[str, Any]]
    members: dict[str, list[str]]

    @classmethod
    def of(
        cls, groups: Iterable[dict[str, Any]], names: Mapping[int, str], *, prefix: str = ""
    ) -> View:
        """Name what is in `groups`; `names` has the parameters of models by `id`."""
        parameters: dict[str, torch.Tensor] = {}
        by_name: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for i, group in enumerate(groups):
            listed = []
            for j, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group{i}.param{j}")
                while name in parameters:  # a module may be called group0, too
                    name += "_"
                parameters[name] = parameter
                listed.append(name)
            called = prefix + group_name(i, listed)
            by_name[called] = group
            members[called] = listed
        return cls(prefix, parameters, by_name, members)

    @property
    def sizes(self) -> list[int]:
        """How many parameters each group has."""
        return [len(listed) for listed in self.members.values()]

    def name(self, parameter: str, key: str) -> str:
        """Return what `key` of the state of a parameter is called."""
        return f"{self.prefix}{STATE}{parameter}.{key}"

    def owner(self, name: str) -> tuple[str, str] | None:
        """Split what `name` made, where a parameter of that name exists."""
        start = self.prefix + STATE
        if name.startswith(start):
            rest = name.removeprefix(start)
            cut = rest.rfind(".")
            while cut > 0:  # a parameter's name has dots, and so may a key
                if rest[:cut] in self.parameters:
                    return rest[:cut], rest[cut + 1 :]
                cut = rest.rfind(".", 0, cut)
        return None

    def is_group(self, name: str) -> bool:
        """Tell whether `name` is that of a group of this optimizer, live or stored."""
        return name.startswith(self.prefix) and is_group_name(name.removeprefix(self.prefix))


def parameter_names(
    models: Sequence[ModelPart], parameters: Iterable[torch.Tensor]
) -> dict[int, str]:
    """Return the names of those of `parameters` that belong to a model, by `id`."""
    # By identity: a parameter does not know its name.
    mine = {id(parameter) for parameter in parameters}
    by_model = [(model.name, model.parameter_names()) for model in models]
    spanned = [(name, names) for name, names in by_model if mine & names.keys()]
    out: dict[int, str] = {}
    for model_name, names in spanned:
        # One model needs no prefix, so a second one in the state does not rename anything.
        prefix = f"{model_name}." if len(spanned) > 1 else ""
        for key, name in names.items():
            out.setdefault(key, prefix + name)
    return out
