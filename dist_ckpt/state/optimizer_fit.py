"""How what is stored of one optimizer fits a live one, and the values that come of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.state.decoding import parse_document, tensor_names
from dist_ckpt.state.encoding import TAG
from dist_ckpt.state.groups import GroupMatch, View, match_groups, options_of
from dist_ckpt.state.layout import dtype_name, dtype_of, empty_beside
from dist_ckpt.state.objects import decode, references
from dist_ckpt.state.optimizer_content import (
    SHARED,
    Content,
    Notes,
    joined,
    optimizer_entries,
    wholes,
)
from dist_ckpt.state.optimizer_made import Faces
from dist_ckpt.state.optimizer_names import forward, in_live_names
from dist_ckpt.state.part import Stored, TensorSpec
from dist_ckpt.state.resizing import grown_moment, live_copy
from dist_ckpt.state.wrapped import alias_of

_AS_IT_IS: Mapping[str, str] = {}


@dataclass(frozen=True)
class OptimizerFit:
    """One live optimizer beside what is stored under its prefix.

    Attributes:
        view: the live one.
        stored: the checkpoint.
        part: what the part is called, for messages.
        groups: the stored groups by name.
        match: which of them is which live one.
        notes: what else is known of the tensors.
        back: what the checkpoint itself calls what is stored, by name, where that is another.
    """

    view: View
    stored: Stored
    part: str
    groups: dict[str, dict[str, Any]]
    match: GroupMatch
    notes: Notes
    back: Mapping[str, str]

    @classmethod
    def of(cls, view: View, given: Stored, part: str) -> OptimizerFit:
        """Match groups.

        Raises:
            IntegrityError: a stored group is malformed.
            IncompatibleError: the state numbers its parameters, and these do not fit.
        """
        stored, back = given, _AS_IT_IS
        groups = _stored_groups(view, stored, part)
        if not all(
            each in view.parameters for group in groups.values() for each in group["params"]
        ):
            renamed = in_live_names(view, given, part)
            stored, back = renamed.stored, renamed.back
            groups = _stored_groups(view, stored, part)
        options = {name: options_of(parse_document(stored.objects[name], name)) for name in groups}
        match = match_groups(
            view.members,
            {name: group["params"] for name, group in groups.items()},
            alike=_Options(options, stored, back).alike,
        )
        return cls(view, stored, part, groups, match, Notes.read(groups.values()), back)

    def targets(
        self, live: Mapping[str, Any], *, in_place: bool
    ) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Return a tensor for each stored one, and the names of objects that have a place here.

        Args:
            live: what the optimizer keeps now, by parameter.
            in_place: whether that may be filled.
        """
        tensors: dict[str, torch.Tensor] = {}
        known: set[str] = set()
        foreign = set(self.match.unexpected)
        # Objects come first: a stored tensor that an object refers to belongs to that object,
        # even if its name could be read as a parameter and a key.
        for name, data in self.stored.objects.items():
            owner = self.view.owner(name)
            mine = owner is not None or name == self.view.prefix + SHARED
            if (mine or self.view.is_group(name)) and name not in foreign:
                known.add(name)
                like = self._beside(name, owner)
                for inner in self.references(name, data):
                    spec = self.stored.tensors[inner]
                    tensors[inner] = self.notes.empty(inner, spec, like=like)
        on_device = self._stepped_on_device()
        entries: dict[str, dict[str, Any]] = {}
        faces = Faces(self.view, self.notes.made, self.part) if self.notes.made else None
        for name, spec in self.stored.tensors.items():
            owner = self.view.owner(name)
            if name not in tensors and owner is not None:
                if owner[0] not in entries:
                    entries[owner[0]] = optimizer_entries(live.get(owner[0]))
                kept = entries[owner[0]].get(owner[1])
                if faces is not None and faces.has(name):
                    tensors[name] = faces.target(name, owner[0], spec, kept=kept, in_place=in_place)
                else:
                    tensors[name] = self._state_target(
                        name, owner, spec, on_device, kept=kept, in_place=in_place
                    )
        if faces is not None:
            faces.check(live, tensors)
        back = self.back
        known = {back.get(name, name) for name in known}
        return {back.get(name, name): tensor for name, tensor in tensors.items()}, known

    @property
    def unexpected(self) -> list[str]:
        """The stored groups, or parameters in them, without a live partner."""
        return [self.back.get(name, name) for name in self.match.unexpected]

    def resized(self, targets: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the rule of each target that has another shape than what is stored for it."""
        specs, resize, back = self.stored.tensors, self.stored.resize, self.back
        here = forward(targets, back) if back else targets
        other = [name for name, each in here.items() if tuple(each.shape) != specs[name].shape]
        return {back.get(name, name): resize(name) for name in other}

    def content(self, tensors: Mapping[str, torch.Tensor], kept: Content) -> Content:
        """Return the values that are stored, and of what is not to be loaded those in `kept`."""
        view, stored = self.view, self.stored
        tensors = forward(tensors, self.back) if self.back else tensors
        values = {
            name: decode(data, tensors=tensors, path=f"{self.part}.{name}")
            for name, data in stored.objects.items()
            if view.is_group(name) or view.owner(name) or name == view.prefix + SHARED
        }
        inside = {name for data in stored.objects.values() for name in references(data)}
        entries: dict[str, dict[str, Any]] = {}
        for name in (*stored.tensors, *stored.objects):
            owner = view.owner(name)
            if owner is not None and name not in inside and (name in tensors or name in values):
                value = values[name] if name in values else tensors[name]
                entries.setdefault(owner[0], {})[owner[1]] = value
        if self.notes.made:
            Faces(view, self.notes.made, self.part).put_together(entries, kept.state)
        for owner_name, state in kept.state.items():
            whole = wholes(state)
            left = state if whole else optimizer_entries(state)
            for key, value in left.items():
                if not stored.selects(view.name(owner_name, key)):
                    entries.setdefault(owner_name, {})[key] = value
        shared = values.get(view.prefix + SHARED, {})
        if not isinstance(shared, dict):
            raise self.malformed(view.prefix + SHARED, "is no dict")
        options = {live: options_of(values[name]) for live, name in self.match.stored_of.items()}
        return Content(
            {name: joined(each) for name, each in entries.items()},
            options,
            shared if stored.selects(view.prefix + SHARED) else kept.shared,
        )

    def unlike(self, cls: str, live: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Tell whether another optimizer wrote this than the one of class `cls`.

        Args:
            cls: what is live, as `package.Class`.
            live: its options by group.
        """
        theirs = {option for group in self.groups.values() for option in options_of(group)}
        ours = {option for options in live.values() for option in options}
        apart = bool(theirs - ours and ours - theirs)
        package, _, name = cls.rpartition(".")
        others = []
        for each in sorted(self.notes.classes):
            from_package, _, stored_name = each.rpartition(".")
            # A class that moved is the same one; of two that share a name the options tell.
            if stored_name != name or (from_package != package and apart):
                others.append(f"{self.part}: saved by {each}, this is {cls}")
        return others

    def references(self, name: str, data: bytes) -> tuple[str, ...]:
        """Return the tensors that an object names.

        Raises:
            IntegrityError: one is not stored.
        """
        names = references(data, path=f"{self.part}.{name}")
        absent = [tensor for tensor in names if tensor not in self.stored.tensors]
        if absent:
            raise self.malformed(name, f"names tensors that are not stored: {absent}")
        return names

    def malformed(self, name: str, what: str) -> IntegrityError:
        """Return the error for a stored object that cannot be what its name says."""
        return IntegrityError(f"stored {self.part}.{name} {what}", kind=ErrorKind.MALFORMED)

    def _beside(self, name: str, owner: tuple[str, str] | None) -> torch.Tensor:
        if owner is not None:
            return self.view.parameters[owner[0]]
        return torch.empty(0)

    def _stepped_on_device(self) -> set[str]:
        return {
            parameter
            for live, name in self.match.stored_of.items()
            if self.groups[name].get("capturable") or self.groups[name].get("fused")
            for parameter in self.view.members[live]
        }

    def _state_target(
        self,
        name: str,
        owner: tuple[str, str],
        spec: TensorSpec,
        on_device: set[str],
        *,
        kept: object,
        in_place: bool,
    ) -> torch.Tensor:
        parameter = self.view.parameters[owner[0]]
        if owner[1] == "step" and not spec.shape:
            # The kernels that run without the host expect the counter beside the parameter.
            device = parameter.device if owner[0] in on_device else torch.device("cpu")
            return empty_beside(parameter, spec, device=device)
        spec = self._cast(owner[0], spec, kept)
        if spec.shape and self.stored.resize(name) is not None:
            shape = grown_moment(parameter, spec, kept, name=f"{self.part}.{name}")
            if shape != spec.shape:
                return self._grown(
                    TensorSpec(spec.dtype, shape), parameter, kept, in_place=in_place
                )
        # What the optimizer has already shows how it wants it: layout, device, memory order.
        if isinstance(kept, torch.Tensor) and tuple(kept.shape) == spec.shape:
            if dtype_name(kept.dtype) == spec.dtype and in_place:
                # Itself, or what shares its memory: a second copy of the moments may not fit.
                live = alias_of(kept) if kept.requires_grad else kept
                return self.notes.ordered(name, live)
            return self.notes.ordered(name, empty_beside(kept, spec))
        return self.notes.empty(name, spec, like=parameter)

    def _grown(
        self, spec: TensorSpec, parameter: torch.Tensor, kept: object, *, in_place: bool
    ) -> torch.Tensor:
        """Return what takes a part of what is stored: as it is live, or zero as it begins."""
        if not isinstance(kept, torch.Tensor):
            return empty_beside(parameter, spec).zero_()
        same = in_place and dtype_name(kept.dtype) == spec.dtype
        return alias_of(kept) if same else live_copy(kept, dtype_of(spec.dtype))

    def _cast(self, owner: str, spec: TensorSpec, kept: object) -> TensorSpec:
        """Return the dtype that a moment must have beside a parameter whose dtype was cast."""
        parameter, stored = self.view.parameters[owner], dtype_of(spec.dtype)
        if not self.stored.cast or not (
            stored.is_floating_point and parameter.dtype.is_floating_point
        ):
            return spec
        if isinstance(kept, torch.Tensor) and kept.dtype.is_floating_point:
            return TensorSpec(dtype_name(kept.dtype), spec.shape)
        # As torch does it: a moment follows its parameter. One that was of another dtype than its
        # parameter (float32 beside bfloat16) was so on purpose, and stays as it is.
        if self.notes.dtypes.get(owner, spec.dtype) != spec.dtype:
            return spec
        return TensorSpec(dtype_name(parameter.dtype), spec.shape)


def _stored_groups(view: View, stored: Stored, part: str) -> dict[str, dict[str, Any]]:
    groups = {}
    for name, data in stored.objects.items():
        if view.is_group(name):
            # Tensor options are not read yet; only names and switches are looked at here.
            blank = {key: torch.empty(0) for key in references(data)}
            value = decode(data, tensors=blank, path=f"{part}.{name}")
            if not isinstance(value, dict) or not _are_names(value.get("params")):
                raise IntegrityError(
                    f"stored {part}.{name} is no parameter group", kind=ErrorKind.MALFORMED
                )
            groups[name] = value
    return groups


class _Options:
    """The encoded options of stored groups, to be compared.

    A rate that is a tensor is there by its name, and counts by its value: the flat form of torch
    has one for each parameter, under a name of its own.
    """

    def __init__(self, options: Mapping[str, Any], stored: Stored, back: Mapping[str, str]) -> None:
        self._options, self._stored, self._back = options, stored, back
        self._values: dict[str, torch.Tensor] | None = None

    def alike(self, first: str, second: str) -> bool:
        """Tell whether two groups have equal options."""
        return self._equal(self._options[first], self._options[second])

    def _equal(self, first: Any, second: Any) -> bool:
        if isinstance(first, dict) and isinstance(second, dict):
            names = [each["v"] for each in (first, second) if each.get(TAG) == "tensor"]
            if len(names) == 2 and names[0] != names[1]:
                one, other = map(self._value, names)
                return one is not None and other is not None and _same(one, other)
            return first.keys() == second.keys() and all(
                self._equal(item, second[key]) for key, item in first.items()
            )
        if isinstance(first, list) and isinstance(second, list):
            return len(first) == len(second) and all(map(self._equal, first, second))
        return type(first) is type(second) and bool(first == second)

    def _value(self, name: str) -> torch.Tensor | None:
        """Return the value of a tensor of one element; None for any other."""
        if self._values is None:
            # All at once: there may be one for each parameter.
            specs = self._stored.tensors
            asked = [
                each
                for options in self._options.values()
                for each in tensor_names(options)
                if each in specs and math.prod(specs[each].shape) == 1
            ]
            asked = list(dict.fromkeys(asked))
            found = self._stored.peek([self._back.get(each, each) for each in asked])
            self._values = dict(zip(asked, found, strict=True))
        return self._values.get(name)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def _are_names(value: object) -> bool:
    # Or numbers, as torch has them.
    return isinstance(value, list) and all(type(item) in (str, int) for item in value)
