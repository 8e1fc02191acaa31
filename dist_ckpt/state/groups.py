"""Which stored parameter group is which live one: pure decisions over names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PREFIX = "param_groups"


def group_name(index: int, parameters: Sequence[str]) -> str:
    """Return what the group at `index` is called in a checkpoint.

    By its first parameter, so that ranks that hold different groups never share a name.
    """
    return f"{PREFIX}.{parameters[0]}" if parameters else f"{PREFIX}[{index}]"


def is_group_name(name: str) -> bool:
    """Tell whether `group_name` may have made `name`."""
    return name.startswith((f"{PREFIX}.", f"{PREFIX}["))


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
    match = GroupMatch()
    # An optimizer has each parameter in one group only, so a set of them is an identity.
    by_parameters = {frozenset(params): name for name, params in stored.items() if params}
    for name, params in live.items():
        found = by_parameters.get(frozenset(params))
        # Empty groups have nothing but their place to be known by.
        if not params and name in stored and not stored[name]:
            found = name
        if found is not None:
            match.stored_of[name] = found
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
    loose = {name: params for name, params in stored.items() if name not in taken}
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
    return match
