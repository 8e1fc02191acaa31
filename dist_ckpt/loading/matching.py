"""Comparing what a state wants with what a checkpoint holds, before any byte of data is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec
import torch

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError, near
from dist_ckpt.options import LoadOptions, matches
from dist_ckpt.state.layout import dtype_name, dtype_of, stored_shape
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.resizing import ResizeRule, can_resize, matches_resize, told_resize

_SHOWN = 20

_log = logging.getLogger("dist_ckpt")


@decodable
class Mismatches(msgspec.Struct, frozen=True):
    """How one rank's state and a checkpoint disagree; names are `part/name`.

    Attributes:
        missing: wanted by the state, not stored.
        unexpected: stored, unknown to the state of this rank.
        shapes: stored in another shape than wanted; the entry tells both.
        dtypes: stored in another dtype than wanted, which may not be cast; likewise.
        casts: stored in another dtype than wanted, to be cast; likewise.
        unlike: written by something else than what the state has; the entry tells both.
        unmatched: patterns of `only`, `skip` and `resize`, keys of `rename`, that match nothing.
        filled: parts of which something is to be loaded; generators of random numbers left out.
        empty: parts to be loaded, of which nothing has a partner.
        resized: of another shape, and loaded in part; the entry tells both.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    casts: list[str] = []
    unmatched: list[str] = []
    unlike: list[str] = []
    filled: list[str] = []
    empty: list[str] = []
    resized: list[str] = []


def compare(
    part: str,
    targets: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorSpec],
    *,
    cast: bool = False,
    resized: Mapping[str, ResizeRule] | None = None,
) -> Mismatches:
    """Compare the target tensors of one part with the stored ones of the same names.

    Args:
        part: what the part is called.
        targets: the tensors to fill.
        stored: what there is for them.
        cast: whether another dtype may be cast where that is allowed at all.
        resized: the rule by which a target may be of another shape.
    """
    mismatches = Mismatches([], [], [], [], [], resized=[])
    for name, target in targets.items():
        spec = stored.get(name)
        if spec is None:
            mismatches.missing.append(f"{part}/{name}")
            continue
        shape, dtype = stored_shape(target), dtype_name(target.dtype)
        if (shape, dtype) == (spec.shape, spec.dtype):
            continue
        both = f"{part}/{name}: stored {spec.dtype}{list(spec.shape)}, wanted {dtype}{list(shape)}"
        rule = (resized or {}).get(name)
        if shape != spec.shape:
            problem = _why_not_resized(rule, spec.shape, target)
            if problem is not None:
                mismatches.shapes.append(both + problem)
                continue
            mismatches.resized.append(f"{both}: {told_resize(spec.shape, shape)}")
        if dtype != spec.dtype:
            possible = can_cast(dtype_of(spec.dtype), target.dtype)
            if cast and possible:
                mismatches.casts.append(both)
            else:
                mismatches.dtypes.append(both if possible else f"{both} (never cast)")
    return mismatches


def _why_not_resized(
    rule: ResizeRule | None, stored: tuple[int, ...], target: torch.Tensor
) -> str | None:
    """Return what keeps a tensor of another shape from being loaded in part; None for nothing."""
    if rule is None:
        return ""
    shape = stored_shape(target)
    if not can_resize(rule, stored, shape):
        return f" (which is more than resize={rule!r} allows)"
    if target.is_meta and not can_resize("crop", stored, shape):
        return " (on the meta device, where there is no rest to be kept: give it memory first)"
    return None


def can_cast(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Tell whether `cast=True` may turn one dtype into the other.

    Floating dtypes may turn into each other, and complex ones likewise: weights live with another
    rounding. An integer may only turn into one that holds each of its values. Never floating to
    integer or back, nor anything from or to bool: there a number would become another thing.
    """
    if stored.is_complex or wanted.is_complex:
        return stored.is_complex and wanted.is_complex
    if stored.is_floating_point or wanted.is_floating_point:
        return stored.is_floating_point and wanted.is_floating_point
    if torch.bool in (stored, wanted):
        return False
    small, large = torch.iinfo(stored), torch.iinfo(wanted)
    return large.min <= small.min and small.max <= large.max


def refuse_mismatches(
    mismatches_by_rank: Sequence[Mismatches], *, where: str, strict: bool = True
) -> Mismatches:
    """Return what the ranks together found, if it is no reason not to load.

    A name is unexpected only when no rank knows it: the stages of a pipeline each know their own.

    Raises:
        IncompatibleError: a shape or dtype differs, or with `strict` a name is missing or
            unexpected. The message has all of it: the first names of each kind and the counts of
            the rest.
    """
    found = Mismatches(
        missing=_union(each.missing for each in mismatches_by_rank),
        unexpected=_common(each.unexpected for each in mismatches_by_rank),
        shapes=_union(each.shapes for each in mismatches_by_rank),
        dtypes=_union(each.dtypes for each in mismatches_by_rank),
        casts=_union(each.casts for each in mismatches_by_rank),
        unlike=_union(each.unlike for each in mismatches_by_rank),
        resized=_union(each.resized for each in mismatches_by_rank),
        filled=(filled := _union(each.filled for each in mismatches_by_rank)),
        empty=sorted(set(_union(each.empty for each in mismatches_by_rank)) - set(filled)),
    )
    findings = {
        "missing in the checkpoint": found.missing,
        "unexpected in the checkpoint": found.unexpected,
        "of another shape": found.shapes,
        "of another dtype": found.dtypes,
        "of another kind": found.unlike,
    }
    loose = found.missing or found.unexpected or found.unlike
    if found.shapes or found.dtypes or (strict and loose):
        lines = [f"  {kind}: {_some_names(names)}" for kind, names in findings.items() if names]
        raise IncompatibleError(
            f"{where} does not fit this state; nothing was changed{_way_out(found)}\n"
            + "\n".join(lines),
            kind=ErrorKind.STATE_MISMATCH,
        )
    if found.empty and not found.filled:
        # Nobody means to load nothing.
        raise IncompatibleError(
            f"{where} and this state have {_nothing_of(found)}", kind=ErrorKind.STATE_MISMATCH
        )
    return found


def tell_empty(where: str, parts: Sequence[str]) -> None:
    """Say which parts nothing is loaded into: with `strict=False` that is no error."""
    if parts:
        _log.warning(
            "nothing of %s goes into %s of the state: they have no name in common",
            where,
            ", ".join(parts),
        )


def unmatched(options: LoadOptions, known: Collection[str], idle: Iterable[str]) -> list[str]:
    """Return the patterns that match none of the `known` names, and the `idle` keys of rename."""
    patterns = (*options.only, *options.skip)
    lost = [each for each in patterns if not any(matches(each, name) for name in known)]
    lost += [
        each for each in options.resize if not any(matches_resize(each, name) for name in known)
    ]
    return lost + sorted(idle)


def check_matched(mismatches_by_rank: Sequence[Mismatches], known: Collection[str]) -> None:
    """Check that every pattern matches something on some rank.

    Args:
        mismatches_by_rank: what each rank found.
        known: the names that rank 0 knows, to offer those like the pattern.

    Raises:
        UsageError: a pattern matches nothing: a slip of the pen must not load nothing silently.
    """
    lost = _common(each.unmatched for each in mismatches_by_rank)
    if lost:
        pattern = lost[0]
        # A pattern is mostly the beginning of names, so it is compared with beginnings.
        wanted = pattern.strip("*").strip("./") or pattern
        hint = near(wanted, _beginnings(known))
        if pattern.startswith("*") and not hint:
            hint = near(wanted, {each for name in known for each in re.split("[./]", name)})
        # The commonest slip: the name of a tensor without the part that it is in.
        if "/" not in pattern and any(fnmatchcase(name, f"*/{pattern}") for name in known):
            hint = f" (names begin with their part: did you mean '*/{pattern}'?)"
        raise UsageError(
            f"{pattern!r} in only, skip, rename or resize matches no name of the checkpoint or the "
            f"state{hint}; nothing was changed"
        )


def _some_names(names: Sequence[str]) -> str:
    """Return the first names, and the count of the rest."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _nothing_of(found: Mismatches) -> str:
    if not (found.missing or found.unexpected):
        parts = ", ".join(found.empty)
        return (
            f"nothing of {parts} to load beside what only= and skip= leave out; nothing was "
            "changed. Leave out less"
        )
    # What strict=False leaves alone would be everything.
    return (
        "not one name in common, so strict=False would load nothing; nothing was changed. rename= "
        f"maps names\n  stored: {_some_names(found.unexpected)}\n  wanted: "
        f"{_some_names(found.missing)}"
    )


def _way_out(found: Mismatches) -> str:
    ways = []
    if found.missing or found.unexpected:
        ways.append("rename= maps names, skip= leaves some out, strict=False what has no partner")
    if any("/param_groups." in name for name in (*found.missing, *found.unexpected)):
        ways.append(
            "an optimizer is built with the parameters and groups that it had when it was saved, "
            "add_param_group included, before it is loaded"
        )
    if found.unlike:
        ways.append("skip= begins with a new one, strict=False takes what fits of the other")
    if any(entry.endswith("]") for entry in found.shapes):
        ways.append(
            'resize={"<name>": "pad"} loads what both have where the state has more, "crop" where '
            "the checkpoint has more"
        )
    if any(not entry.endswith("(never cast)") for entry in found.dtypes):
        ways.append("cast=True converts floating dtypes, and integers to wider ones")
    return f" ({'; '.join(ways)})" if ways else ""


def _beginnings(names: Collection[str]) -> set[str]:
    """Return `names` and all that they begin with up to a `.` or `/`."""
    cuts = ((name, at) for name in names for at, char in enumerate(name) if char in "./")
    return {*names, *(name[:at] for name, at in cuts)}


def _union(lists: Iterable[list[str]]) -> list[str]:
    return sorted({name for names in lists for name in names})


def _common(lists: Iterable[list[str]]) -> list[str]:
    first, *rest = (set(names) for names in lists)
    return sorted(first.intersection(*rest))
