"""What a checkpoint says of an optimizer's tensors beside their values.

An index knows dtype and shape. What an optimizer keeps may depend on more: on the order in which
its elements lie in memory, and on whether it is a plain tensor although its parameter is sharded.
A note is a key of a stored group that begins with `@`; only the class is always there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_ckpt.state.groups import MARK
from dist_ckpt.state.layout import dtype_name, dtype_of, empty_beside, in_order, memory_order
from dist_ckpt.state.part import TensorSpec

_CLASS = f"{MARK}class"
_DTYPES = f"{MARK}dtypes"
_ORDER = f"{MARK}order"
_PLAIN = f"{MARK}plain"
_LIKE = f"{MARK}like"


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of all groups together; empty for a checkpoint from before there were any.

    Attributes:
        classes: what the optimizer was, as `package.Class`.
        dtypes: by parameter, its dtype then.
        order: by tensor, see `dist_ckpt.state.layout.memory_order`.
        plain: tensors that were plain beside a DTensor.
        like: by tensor that is no state of one parameter, the parameter it is laid out as.
    """

    classes: set[str] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    like: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, groups: Iterable[Mapping[str, Any]]) -> Notes:
        """Gather the notes of stored groups; what is of another form than ours is no note."""
        notes = cls()
        for group in groups:
            if isinstance(group.get(_CLASS), str):
                notes.classes.add(group[_CLASS])
            dtypes, params = group.get(_DTYPES), group["params"]
            if isinstance(dtypes, str):
                notes.dtypes.update(dict.fromkeys(params, dtypes))
            elif isinstance(dtypes, list) and len(dtypes) == len(params):
                notes.dtypes.update(zip(params, map(str, dtypes), strict=True))
            notes.order.update(_dict(group.get(_ORDER)))
            notes.like.update(_dict(group.get(_LIKE)))
            plain = group.get(_PLAIN)
            notes.plain.update(map(str, plain) if isinstance(plain, list) else ())
        return notes

    @classmethod
    def of_entry(cls, noted: Mapping[str, Any]) -> Notes:
        """Return the notes of an entry that is in no group, which tell of all its tensors."""
        return cls.read([{_CLASS: "", **noted, "params": []}])

    def empty(self, name: str, spec: TensorSpec, *, like: torch.Tensor) -> torch.Tensor:
        """Return an unfilled tensor for what is stored as `name`, laid out as it was.

        Args:
            name: the stored tensor.
            spec: its dtype and shape; the dtype is that of the result.
            like: what it stands beside in arithmetic.
        """
        if name in self.plain:
            # Next to its parameter, though torch would refuse to mix the two in one operation:
            # an optimizer that keeps it so does not mix them.
            made = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=like.device)
        else:
            made = empty_beside(like, spec)
        return self.ordered(name, made)

    def ordered(self, name: str, made: torch.Tensor) -> torch.Tensor:
        """Return `made`, or memory in the order in which `name` lay."""
        order = self.order.get(name)
        if order is not None and sorted(map(int, order)) != list(range(made.ndim)):
            return made  # it lies about another tensor; the values are right in any order
        return in_order(made, order) if self.classes else made


def class_notes(cls: str, parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the notes that every group has."""
    dtypes = [parameter.dtype for parameter in parameters]
    if len(set(dtypes)) == 1:
        return {_CLASS: cls, _DTYPES: dtype_name(dtypes[0])}
    return {_CLASS: cls, _DTYPES: [dtype_name(dtype) for dtype in dtypes]}


def tensor_notes(
    tensors: Mapping[str, torch.Tensor], beside: torch.Tensor | None, among: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must be noted of `tensors`: nothing in nearly all cases.

    Args:
        tensors: by stored name.
        beside: the parameter whose state they are; None where they belong to no single one.
        among: the parameters that those may be laid out as, by name.
    """
    notes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        order = memory_order(tensor)
        if order is not None:
            notes.setdefault(_ORDER, {})[name] = order
        if isinstance(beside, DTensor) and tensor.ndim and not isinstance(tensor, DTensor):
            notes.setdefault(_PLAIN, []).append(name)
        if beside is None and isinstance(tensor, DTensor):
            for parameter, other in among.items():
                if _same_layout(tensor, other):
                    notes.setdefault(_LIKE, {})[name] = parameter
                    break
    return notes


def merge_notes(into: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """Add `notes` of further tensors to those of a group."""
    for key, value in notes.items():
        if isinstance(value, dict):
            into.setdefault(key, {}).update(value)
        else:
            into.setdefault(key, []).extend(value)


def _same_layout(tensor: DTensor, other: object) -> bool:
    return (
        isinstance(other, DTensor)
        and other.shape == tensor.shape
        and other.device_mesh == tensor.device_mesh
        and other.placements == tensor.placements
    )


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
