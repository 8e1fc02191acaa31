"""An optimizer as a part: moments under the names of their parameters, groups as objects.

Names: `state.<parameter>.<key>` for what the optimizer keeps per parameter, tensors as tensors
and the rest as objects; `param_groups.<first parameter>` for the options of a group and the
names of its parameters, or `param_groups[i]` where a group is empty; `shared_state` for what an
optimizer keeps under keys that are no parameters. Nothing here ever steps an optimizer or calls
its `load_state_dict`, which casts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.state.decoding import parse
from dist_ckpt.state.groups import GroupMatch, group_name, is_group_name, match_groups
from dist_ckpt.state.layout import check_storable, dtype_name, empty_beside
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.objects import decode, encode, references
from dist_ckpt.state.part import Captured, Stored, Targets, TensorSpec

_STATE = "state."
_SHARED = "shared_state"
# How a group lists its parameters; everything else in it is an option.
_STRUCTURE = frozenset({"params", "param_names"})


@dataclass(frozen=True)
class _View:
    """The optimizer as it is now: its parameters and its groups by name."""

    parameters: dict[str, torch.Tensor]
    groups: dict[str, dict[str, Any]]
    members: dict[str, list[str]]

    def owner(self, name: str) -> tuple[str, str] | None:
        """Split `state.<parameter>.<key>` where a parameter of that name exists."""
        if name.startswith(_STATE):
            rest = name.removeprefix(_STATE)
            cut = rest.rfind(".")
            while cut > 0:  # a parameter's name has dots, and so may a key
                if rest[:cut] in self.parameters:
                    return rest[:cut], rest[cut + 1 :]
                cut = rest.rfind(".", 0, cut)
        return None


class OptimizerPart:
    """The state and the options of `optimizer`, whose parameters are those of `models`.

    Restoring makes the state exactly the stored one and sets every stored option of every group
    in the live group dicts, which schedulers hold. An option that only this program knows keeps
    its value. Parameters that belong to no model are called `group{i}.param{j}`.
    """

    def __init__(
        self, optimizer: Optimizer, *, models: Sequence[ModelPart] = (), name: str = "optimizer"
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self._models = tuple(models)
        for model in self._models:
            model.stepped_by(optimizer)

    def capture(self) -> Captured:
        """Return the live state tensors, and options and other state values encoded."""
        view = self._view()
        tensors: dict[str, torch.Tensor] = {}
        plain: dict[str, object] = {}
        # In the order of the groups: that of `state` depends on which gradient came first. And
        # by `get`, since reading an absent key of `state` would create it.
        for owner, parameter in view.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                name = f"{_STATE}{owner}.{key}"
                # Encoded later, so that tensors inside give way to these names.
                if isinstance(value, torch.Tensor):
                    check_storable(value, self.name, name)
                    tensors[name] = value
                else:
                    plain[name] = value
        shared = self._shared_state(view)
        if shared:
            plain[_SHARED] = shared
        for name, group in view.groups.items():
            options = {key: value for key, value in group.items() if key not in _STRUCTURE}
            plain[name] = {**options, "params": view.members[name]}
        objects = {
            name: encode(value, path=f"{self.name}.{name}", tensors=tensors, prefix=name)
            for name, value in plain.items()
        }
        # Options may be tensors too, but those are a scheduler's to change, at any time.
        stepped = {name for name in tensors if not is_group_name(name)}
        return Captured(tensors, objects, stepped=frozenset(stepped))

    def targets(self, stored: Stored) -> Targets:
        """Return a tensor for each stored one: laid out as its parameter, in the stored dtype."""
        view = self._view()
        groups = self._stored_groups(stored)
        match = self._match(view, stored, groups)
        on_device = _stepped_on_device(view, match, groups)
        tensors: dict[str, torch.Tensor] = {}
        # Objects come first: a stored tensor that an object refers to belongs to that object,
        # even if its name could be read as a parameter and a key.
        foreign = set(match.unexpected)
        for name, data in stored.objects.items():
            owner = view.owner(name)
            if owner is None and name != _SHARED and not is_group_name(name):
                foreign.add(name)
            if name not in foreign:
                like = torch.empty(0) if owner is None else view.parameters[owner[0]]
                for inner in self._references(name, data, stored):
                    tensors[inner] = empty_beside(like, stored.tensors[inner])
        for name, spec in stored.tensors.items():
            owner = view.owner(name)
            if name not in tensors and owner is not None:
                tensors[name] = self._state_target(view, owner, spec, on_device)
        unexpected = sorted(foreign | (stored.tensors.keys() - tensors.keys()))
        return Targets(tensors, match.missing, unexpected)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the optimizer's state exactly what is stored, and set the options of its groups."""
        # Groups are matched anew: nothing is kept from `targets`, which a dry run may call.
        view = self._view()
        match = self._match(view, stored, self._stored_groups(stored))
        values = {
            name: decode(data, tensors=tensors, path=f"{self.name}.{name}")
            for name, data in stored.objects.items()
        }
        inside = {name for n, data in stored.objects.items() for name in references(data)}
        state: dict[str, dict[str, Any]] = {}
        for name in (*stored.tensors, *stored.objects):
            owner = view.owner(name)
            if owner is not None and name not in inside and (name in tensors or name in values):
                value = values[name] if name in values else tensors[name]
                state.setdefault(owner[0], {})[owner[1]] = value
        shared = values.get(_SHARED, {})
        kept = self._shared_state(view)
        if not isinstance(shared, dict):
            raise self._malformed(_SHARED, "is no dict")
        self._keep_unselected(view, state, stored)
        # From here on nothing can fail: everything stored is decoded and has its place.
        self.optimizer.state.clear()
        for parameter_name, entries in state.items():
            self.optimizer.state[view.parameters[parameter_name]] = entries
        self.optimizer.state.update(shared if stored.selects(_SHARED) else kept)
        for live_name, stored_name in match.stored_of.items():
            group = view.groups[live_name]
            for key, value in values[stored_name].items():
                if key not in _STRUCTURE:
                    group[key] = _in_place(group.get(key), value)

    def _keep_unselected(
        self, view: _View, state: dict[str, dict[str, Any]], stored: Stored
    ) -> None:
        """Add to the new `state` what the optimizer has now and is not to be loaded."""
        for owner, parameter in view.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not stored.selects(f"{_STATE}{owner}.{key}"):
                    state.setdefault(owner, {})[key] = value

    def _view(self) -> _View:
        names = self._names()
        parameters: dict[str, torch.Tensor] = {}
        groups: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            listed = []
            for j, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group{i}.param{j}")
                while name in parameters:  # a module may be called group0, too
                    name += "_"
                parameters[name] = parameter
                listed.append(name)
            groups[group_name(i, listed)] = group
            members[group_name(i, listed)] = listed
        return _View(parameters, groups, members)

    def _names(self) -> dict[int, str]:
        # By identity: a parameter does not know its name.
        mine = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        by_model = [(model.name, model.parameter_names()) for model in self._models]
        spanned = [(name, names) for name, names in by_model if mine & names.keys()]
        out: dict[int, str] = {}
        for model_name, names in spanned:
            # One model needs no prefix, so a second one in the state does not rename anything.
            prefix = f"{model_name}." if len(spanned) > 1 else ""
            for key, name in names.items():
                out.setdefault(key, prefix + name)
        return out

    def _shared_state(self, view: _View) -> dict[Any, Any]:
        known = {id(parameter) for parameter in view.parameters.values()}
        shared: dict[Any, Any] = {}
        state: Mapping[Any, Any] = self.optimizer.state
        for key, value in state.items():
            if not isinstance(key, torch.Tensor):
                shared[key] = value
            elif id(key) not in known:
                raise UsageError(
                    f"{self.name} keeps state for a tensor of shape {tuple(key.shape)} that is in "
                    "none of its groups: build the optimizer after the module is wrapped or moved"
                )
        return shared

    def _stored_groups(self, stored: Stored) -> dict[str, dict[str, Any]]:
        groups = {}
        for name, data in stored.objects.items():
            if is_group_name(name):
                # Tensor options are not read yet; only names and switches are looked at here.
                blank = {key: torch.empty(0) for key in references(data)}
                value = decode(data, tensors=blank, path=f"{self.name}.{name}")
                if not isinstance(value, dict) or not _are_names(value.get("params")):
                    raise self._malformed(name, "is no parameter group")
                groups[name] = value
        return groups

    def _match(
        self, view: _View, stored: Stored, groups: Mapping[str, Mapping[str, Any]]
    ) -> GroupMatch:
        # As written: a rate that is a tensor is there by its name, which no other group's has.
        options = {
            name: {
                key: value
                for key, value in parse(stored.objects[name], name).items()
                if key not in _STRUCTURE
            }
            for name in groups
        }
        return match_groups(
            view.members,
            {name: group["params"] for name, group in groups.items()},
            alike=lambda first, second: options[first] == options[second],
        )

    def _references(self, name: str, data: bytes, stored: Stored) -> tuple[str, ...]:
        names = references(data, path=f"{self.name}.{name}")
        absent = [tensor for tensor in names if tensor not in stored.tensors]
        if absent:
            raise self._malformed(name, f"names tensors that are not stored: {absent}")
        return names

    def _state_target(
        self, view: _View, owner: tuple[str, str], spec: TensorSpec, on_device: set[str]
    ) -> torch.Tensor:
        name, key = owner
        parameter = view.parameters[name]
        if key == "step" and not spec.shape:
            # The kernels that run without the host expect the counter beside the parameter.
            device = parameter.device if name in on_device else torch.device("cpu")
            return empty_beside(parameter, spec, device=device)
        live = self.optimizer.state.get(parameter, {}).get(key)
        # What the optimizer has already shows how it wants it: layout, device, memory order.
        if isinstance(live, torch.Tensor) and tuple(live.shape) == spec.shape:
            if dtype_name(live.dtype) == spec.dtype:
                # Itself, or what shares its memory: a second copy of the moments may not fit.
                return live.detach() if live.requires_grad else live
            return empty_beside(live, spec)
        return empty_beside(parameter, spec)

    def _malformed(self, name: str, what: str) -> IntegrityError:
        return IntegrityError(f"stored {self.name}.{name} {what}", kind=ErrorKind.MALFORMED)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _stepped_on_device(
    view: _View, match: GroupMatch, stored: Mapping[str, Mapping[str, Any]]
) -> set[str]:
    return {
        parameter
        for live_name, stored_name in match.stored_of.items()
        if stored[stored_name].get("capturable") or stored[stored_name].get("fused")
        for parameter in view.members[live_name]
    }


def _in_place(live: Any, value: Any) -> Any:
    """Return what an option becomes: a live tensor stays itself and takes the value."""
    if isinstance(live, torch.Tensor) and isinstance(value, (torch.Tensor, int, float)):
        new = torch.as_tensor(value)
        with torch.no_grad():
            return live.copy_(new) if new.shape == live.shape else new
    if isinstance(live, tuple) and isinstance(value, tuple) and len(live) == len(value):
        return tuple(map(_in_place, live, value))
    # The program decides if a rate is a tensor; a float32 becomes the same number as a float.
    if isinstance(value, torch.Tensor) and isinstance(live, (int, float)):
        return value.item()
    return value
