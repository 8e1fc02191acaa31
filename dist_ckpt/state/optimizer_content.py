"""What one optimizer keeps, and how it is written down.

Names: `state.<parameter>.<key>` for what the optimizer keeps per parameter, tensors as tensors
and the rest as objects; `param_groups.<first parameter>` for the options of a group and the
names of its parameters, or `param_groups[i]` where a group is empty; `shared_state` for what an
optimizer keeps under keys that are no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError
from dist_ckpt.state.layout import check_storable
from dist_ckpt.state.objects import encode
from dist_ckpt.state.optimizer_notes import class_notes, merge_notes, tensor_notes
from dist_ckpt.state.optimizer_view import STATE, View

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
        entries = optimizer_entries(content.state.get(owner))
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
            notes[owner] = tensor_notes(mine, parameter, {})
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


def optimizer_entries(entry: Any) -> dict[str, Any]:
    """Return what an optimizer keeps for one parameter, by the keys under which it is stored."""
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        return {WHOLE: [entry]}
    if set(map(type, entry)) <= _TEXT:
        return entry
    # Keys that are no text would come back as text from a name.
    named = {key: value for key, value in entry.items() if type(key) is str}
    return {**named, OTHERS: {k: v for k, v in entry.items() if type(k) is not str}}


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
