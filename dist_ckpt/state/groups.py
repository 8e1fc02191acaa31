"""Which stored parameter group is which live one: pure decisions over names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        stored_of: by live group name; both have the same parameters, in whatever order.
        missing: live groups, or `group[parameter]` where a group of that name has others.
        unexpected: stored ones, likewise.
    """

    stored_of: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def match_groups(
    live: Mapping[str, Sequence[str]], stored: Mapping[str, Sequence[str]]
) -> GroupMatch:
    """Match live groups to stored ones, each given as name to canonical parameter names."""
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
