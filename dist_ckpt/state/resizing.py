"""Tensors that have grown or shrunk since they were saved: what of them is loaded, if asked to."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.state.layout import local_of, unfilled_like
from dist_ckpt.state.part import TensorSpec

ResizeRule: TypeAlias = Literal["pad", "crop", "overlap"]
RESIZE_RULES: tuple[ResizeRule, ...] = get_args(ResizeRule)

_STATE = "state."


def check_resize(value: object) -> dict[str, ResizeRule]:
    """Return the rules of the option `resize`, as they were given.

    Raises:
        UsageError: they are no mapping of patterns to rules.
    """
    if not isinstance(value, Mapping):
        raise UsageError(
            f"resize maps patterns to {_listed()}, as in {{'*embed*': 'pad'}}, not {value!r}"
        )
    for pattern, rule in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(f"resize has patterns such as 'model/embed.*', not {pattern!r}")
        if rule not in RESIZE_RULES:
            raise UsageError(f"resize[{pattern!r}] is one of {_listed()}, not {rule!r}")
    return dict(value)


def matches_resize(pattern: str, name: str) -> bool:
    """Tell whether a pattern is of `part/name`; one without a `/` is of the part or of the name.

    It is of what an optimizer keeps for a parameter, too, if it is of the parameter.
    """
    part, _, inner = name.partition("/")
    head, slash, rest = pattern.rpartition("/")
    if not slash:
        names = _names(inner)
        # A word may be the part of the parameter, of which nothing is said where its moments lie.
        if len(names) > 1 and pattern.isidentifier():
            return True
        return any(fnmatchcase(each, pattern) for each in (part, f"{part}.{inner}", *names))
    if fnmatchcase(name, pattern):
        return True
    # What is kept for a parameter lies in another part than the parameter, whatever its part.
    return any(fnmatchcase(each, rest) for each in _names(inner)[1:]) and head != part


def _names(inner: str) -> list[str]:
    """Return `inner`, and the parameter if it is what an optimizer keeps for one."""
    _, state, kept = f".{inner}".partition(f".{_STATE}")
    return [inner, kept.rpartition(".")[0]] if state and "." in kept else [inner]


def rule_for(rules: Mapping[str, ResizeRule], name: str) -> ResizeRule | None:
    """Return the rule of the first pattern that is of `part/name`; None without one."""
    return next((rule for pattern, rule in rules.items() if matches_resize(pattern, name)), None)


def can_resize(rule: ResizeRule, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether `rule` lets a tensor of the shape `wanted` take one of the shape `stored`."""
    if len(stored) != len(wanted):
        return False
    pairs = list(zip(stored, wanted, strict=True))
    grown, shrunk = any(a < b for a, b in pairs), any(a > b for a, b in pairs)
    return not ((rule == "pad" and shrunk) or (rule == "crop" and grown))


def told_resize(stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Say what becomes of a tensor that is resized."""
    pairs = list(zip(stored, wanted, strict=True))
    said = []
    if any(a < b for a, b in pairs):
        said.append("the rest of it kept")
    if any(a > b for a, b in pairs):
        said.append("the rest of what is stored left out")
    return " and ".join(said)


def grown_moment(
    parameter: torch.Tensor, spec: TensorSpec, kept: object, *, name: str
) -> tuple[int, ...]:
    """Return the shape that what an optimizer keeps has now, of a parameter that was resized.

    Args:
        parameter: as it is now.
        spec: what is stored.
        kept: what the optimizer has already.
        name: of the stored one, for the message.

    Raises:
        IncompatibleError: nothing says how it follows the parameter.
    """
    if isinstance(kept, torch.Tensor):
        return tuple(kept.shape)
    if len(spec.shape) == parameter.ndim:
        # A dimension that was summed over has one element, however long the parameter is.
        pairs = zip(spec.shape, parameter.shape, strict=True)
        return tuple(1 if stored == 1 else now for stored, now in pairs)
    if set(spec.shape) <= {1, *parameter.shape}:
        return spec.shape
    raise IncompatibleError(
        f"{name} has shape {list(spec.shape)} beside a parameter of shape "
        f"{list(parameter.shape)}, and nothing says how it is resized with it: let the optimizer "
        "make its state first (one step), or leave it out with skip=",
        kind=ErrorKind.STATE_MISMATCH,
    )


def live_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return memory with the values of `tensor`, for what takes only a part of it."""
    copied = unfilled_like(tensor, dtype=dtype)
    with torch.no_grad():
        local_of(copied).copy_(local_of(tensor))
    return copied


def _listed() -> str:
    return ", ".join(map(repr, RESIZE_RULES))
