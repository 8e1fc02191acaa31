"""Values that ranks hold under one name, each for its own share: the groups of an optimizer.

A group is called by its first parameter. Where several stages of a pipeline have that parameter,
and each of them others beside it, their groups are versions of one name: all of them are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.saving.messages import Description

Digests = dict[str, dict[str, str]]
"""Digests of encoded values, by part and name."""

Versions = Mapping[str, Mapping[str, str]]
"""By part and stored name, what the rank itself calls a value that is stored as a version."""


def split_versions(descriptions: Sequence[Description]) -> tuple[list[Digests], list[Versions]]:
    """Give each version of a value that may have versions a name of its own.

    Returns:
        For each rank the digests of its values by the names under which they are stored, and what
        it calls those with another name.

    Raises:
        IncompatibleError: versions differ in what must be equal on all ranks.
    """
    by_rank: list[Digests] = []
    own_names: list[Versions] = []
    # For each name what was seen so far: digests in the order of ranks, the first rank of each.
    seen: dict[tuple[str, str], dict[str, int]] = {}
    taken = {
        (part, name)
        for each in descriptions
        for part, named in each.objects.items()
        for name in named
    }
    for rank, each in enumerate(descriptions):
        digests: Digests = {}
        own: dict[str, dict[str, str]] = {}
        for part, named in each.objects.items():
            versioned = each.versioned.get(part, {})
            for name, digest in named.items():
                stored = name
                if name in versioned:
                    ranks = seen.setdefault((part, name), {})
                    first = ranks.setdefault(digest, rank)
                    _check_common(descriptions, part, name, (next(iter(ranks.values())), first))
                    stored = _stored_name(part, name, list(ranks).index(digest), taken)
                    if stored != name:
                        own.setdefault(part, {})[stored] = name
                digests.setdefault(part, {})[stored] = digest
        by_rank.append(digests)
        own_names.append(own)
    return by_rank, own_names


def _stored_name(part: str, name: str, number: int, taken: set[tuple[str, str]]) -> str:
    if not number:
        return name
    stored = f"{name}~{number}"
    while (part, stored) in taken:  # a parameter may be called so
        stored += "~"
    return stored


def _check_common(
    descriptions: Sequence[Description], part: str, name: str, ranks: tuple[int, int]
) -> None:
    one, other = (descriptions[rank].versioned.get(part, {}).get(name) for rank in ranks)
    if one != other:
        raise IncompatibleError(
            f"{name!r} of part {part!r} has other options on rank {ranks[0]} than on rank "
            f"{ranks[1]}, and both step its first parameter: give a parameter the same options on "
            "all ranks that have it",
            kind=ErrorKind.REPLICAS_DIFFER,
        )
