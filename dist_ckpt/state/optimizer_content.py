"""What one optimizer keeps, and how it is written down.

Names: `state.<parameter>.<key>` for what the optimizer keeps per parameter, tensors as tensors
and the rest as objects; `param_groups.<first parameter>` for the options of a group and the
names of its parameters, or `param_groups[i]` where a group is empty; `shared_state` for what an
optimizer keeps under keys that are no parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.groups import MADE, MARK, STATE, View
from dist_ckpt.state.layout import (
    check_storable,
    dtype_name,
    dtype_of,
    empty_beside,
    in_order,
    is_wrapped,
    memory_order,
)
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.rebuilding import how_made
from dist_ckpt.state.spread import pieces

# What a checkpoint says of an optimizer's tensors beside their values.
#
# An index knows dtype and shape. What an optimizer keeps may depend on more: on the order in which
# its elements lie in memory, and on whether it is a plain tensor although its parameter is sharded.
# A note is a key of a stored group that begins with `@`; only the class is always there.


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
        made: by what is several tensors behind one face, how one is built of these.
    """

    classes: set[str] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    like: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

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
            notes.made.update(_dict(group.get(MADE)))
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


SHARED = "shared_state"
# Keys of no parameter's own making: an entry that is no dict, and entries under other keys.
WHOLE, OTHERS = "@whole", "@others"
_TEXT = {str}


@dataclass(slots=True)
class Content:
    """Values of one optimizer, as they are in memory or as they were decoded.

    Attributes:
        state: by parameter, what is kept for it.
        options: by live group, everything but its parameters.
        shared: what is kept under keys that are no parameters.
    """

    state: dict[str, Any] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Capture:
    """What was written down so far of a part: see `dist_ckpt.state.part.Captured`.

    Attributes:
        part: its name, for messages.
        stepped: names of the tensors that are state of a parameter.
        groups: names of the groups.
    """

    part: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    stepped: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)

    def add_value(self, name: str, value: object) -> dict[str, torch.Tensor]:
        """Encode a value, and return the tensors in it by name."""
        before = len(self.tensors)
        self.objects[name] = encode(
            value, path=f"{self.part}.{name}", tensors=self.tensors, prefix=name
        )
        # A dict keeps the order of insertion: what is new is at the end.
        added = len(self.tensors) - before
        return dict(islice(reversed(self.tensors.items()), added)) if added else {}


def write_down(view: View, content: Content, written: Capture, *, cls: str) -> None:
    """Name and encode `content`.

    Args:
        view: the optimizer.
        content: what it keeps.
        written: receives tensors and objects.
        cls: what the optimizer is, as `package.Class`.
    """
    start = view.prefix + STATE
    plain: dict[str, dict[str, object]] = {}
    notes: dict[str, dict[str, Any]] = {}
    # In the order of the groups: that of `state` depends on which gradient came first.
    for owner, parameter in view.parameters.items():
        entry = content.state.get(owner)
        entries = optimizer_entries(entry, where=f"{written.part}.{start}{owner}.")
        for key, whole in wholes(entry).items():
            noted = {MADE: {f"{start}{owner}.{key}": how_made(whole)}}
            merge_notes(notes.setdefault(owner, {}), noted)
        mine: dict[str, torch.Tensor] = {}
        sharded = isinstance(parameter, DTensor)
        for key, value in entries.items():
            name = f"{start}{owner}.{key}"
            # Objects come later, so that tensors inside give way to these names.
            if isinstance(value, torch.Tensor):
                check_storable(value, written.part, name)
                written.tensors[name] = value
                # Asked here, since nearly none is: this is done for each tensor of each save.
                if not value.is_contiguous() or (sharded and not isinstance(value, DTensor)):
                    mine[name] = value
            else:
                plain.setdefault(owner, {})[name] = value
        if mine:
            merge_notes(notes.setdefault(owner, {}), tensor_notes(mine, parameter, {}))
    for owner, values in plain.items():
        for name, value in values.items():
            inner = written.add_value(name, value)
            if inner:
                merge_notes(
                    notes.setdefault(owner, {}), tensor_notes(inner, view.parameters[owner], {})
                )
    general: dict[str, Any] = {}
    if content.shared:
        shared = written.add_value(view.prefix + SHARED, content.shared)
        general = tensor_notes(shared, None, view.parameters)
    written.stepped.update(written.tensors)
    for name in view.groups:
        parameters = {owner: view.parameters[owner] for owner in view.members[name]}
        noted = class_notes(cls, parameters.values())
        # In the order of the parameters: every rank has to write the same.
        for owner in parameters if notes else ():
            merge_notes(noted, notes.get(owner, {}))
        # Of what belongs to no group the first one speaks.
        merge_notes(noted, general)
        general = {}
        options = {**content.options[name], "params": view.members[name], **noted}
        written.add_value(name, options)
        written.groups.add(name)


def optimizer_entries(entry: Any, *, where: str = "") -> dict[str, Any]:
    """Return what an optimizer keeps for one parameter, by the keys under which it is stored.

    Args:
        entry: what it keeps.
        where: what that is called, for messages.

    Raises:
        UsageError: a tensor is sharded in a way that its class does not let anybody follow.
    """
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        return {WHOLE: [entry]}
    if set(map(type, entry)) <= _TEXT:
        return _unwrapped(entry, where)
    # Keys that are no text would come back as text from a name.
    named = {key: value for key, value in entry.items() if type(key) is str}
    return {
        **_unwrapped(named, where),
        OTHERS: {k: v for k, v in entry.items() if type(k) is not str},
    }


def wholes(entry: Any) -> dict[str, torch.Tensor]:
    """Return what of an entry is stored as the several tensors that it is made of."""
    if not isinstance(entry, dict):
        return {}
    return {key: v for key, v in entry.items() if type(key) is str and is_wrapped(v)}


def _unwrapped(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if not any(map(is_wrapped, entry.values())):
        return entry
    found: dict[str, Any] = {}
    for key, value in entry.items():
        inner = pieces(value, f"{where}{key}")
        found |= {key + suffix: each for suffix, each in inner.items()}
    return found


def joined(entries: Mapping[str, Any]) -> Any:
    """Return what `optimizer_entries` took apart."""
    if WHOLE in entries:
        return entries[WHOLE][0]
    others = entries.get(OTHERS, {})
    return {key: value for key, value in entries.items() if key != OTHERS} | others


def check_own(state: Mapping[Any, Any], view: View, part: str) -> dict[Any, Any]:
    """Return what `state` has under keys that are no parameters.

    Raises:
        UsageError: one is a tensor that is in none of the groups.
    """
    known = {id(parameter) for parameter in view.parameters.values()}
    shared: dict[Any, Any] = {}
    for key, value in state.items():
        if not isinstance(key, torch.Tensor):
            shared[key] = value
        elif id(key) not in known:
            raise UsageError(
                f"{part} keeps state for a tensor of shape {tuple(key.shape)} that is in "
                "none of its groups: build the optimizer after the module is wrapped or moved"
            )
    return shared
