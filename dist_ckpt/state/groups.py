"""Which stored parameter group is which live one: pure decisions over names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_ckpt.format.digest import bytes_digest
from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import dumps

PREFIX = "param_groups"
MARK = "@"
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
