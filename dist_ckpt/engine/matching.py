"""Comparing what a state wants with what a checkpoint holds, before any byte of data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch

from dist_ckpt.dcp.planner import dtype_name
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.state.part import TensorSpec

_SHOWN = 20


class Misfits(msgspec.Struct):
    """How one rank's state and a checkpoint disagree; names are `part/name`.

    Attributes:
        missing: wanted by the state, not stored.
        unexpected: stored, unknown to the state of this rank.
        mismatched: stored otherwise than wanted; the entry tells both.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    mismatched: list[str] = []


def compare(
    part: str, targets: Mapping[str, torch.Tensor], stored: Mapping[str, TensorSpec]
) -> Misfits:
    """Compare the target tensors of one part with the stored ones of the same names."""
    misfits = Misfits([], [], [])
    for name, target in targets.items():
        spec = stored.get(name)
        if spec is None:
            misfits.missing.append(f"{part}/{name}")
        elif (dtype_name(target.dtype), tuple(target.shape)) != (spec.dtype, spec.shape):
            misfits.mismatched.append(
                f"{part}/{name}: stored {spec.dtype}{list(spec.shape)}, "
                f"wanted {dtype_name(target.dtype)}{list(target.shape)}"
            )
    return misfits


def judge(misfits_by_rank: Sequence[Misfits], *, where: str) -> None:
    """Raise unless the ranks together fit the checkpoint.

    A name is unexpected only when no rank knows it: the stages of a pipeline each know their own.

    Raises:
        IncompatibleError: with the first names of each kind and the counts of the rest.
    """
    missing = _union(each.missing for each in misfits_by_rank)
    mismatched = _union(each.mismatched for each in misfits_by_rank)
    unexpected = sorted(set.intersection(*(set(each.unexpected) for each in misfits_by_rank)))
    findings = {
        "missing in the checkpoint": missing,
        "unexpected in the checkpoint": unexpected,
        "of another shape or dtype": mismatched,
    }
    if any(findings.values()):
        lines = [f"{kind}: {_shown(names)}" for kind, names in findings.items() if names]
        raise IncompatibleError(
            f"{where} does not fit this state; nothing was changed. " + "; ".join(lines),
            kind=ErrorKind.STATE_MISMATCH,
        )


def _union(lists: Iterable[list[str]]) -> list[str]:
    return sorted({name for names in lists for name in names})


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
