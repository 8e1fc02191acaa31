"""An optimizer as a part: moments under the names of their parameters, groups as objects.

How values are named is written in `dist_ckpt.state.optimizer_content`. Where the face has more to
tell than torch's form has room for, `own.<key>` is what its `state_dict` has under another key,
`inner.<path>.` is what begins the names of an optimizer whose `state_dict` lies in there, and
`beside.<attribute>.` those of one inside the face of which the face tells nothing. Nothing here
ever steps an optimizer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.state.decoding import decode, parse_document, references, tensor_names
from dist_ckpt.state.encoding import TAG
from dist_ckpt.state.layout import (
    address,
    alias_of,
    dtype_name,
    dtype_of,
    empty_beside,
    show_classes,
)
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer_content import (
    SHARED,
    Capture,
    Content,
    Faces,
    GroupMatch,
    Notes,
    View,
    joined,
    match_groups,
    optimizer_entries,
    options_of,
    parameter_names,
    wholes,
    write_down,
)
from dist_ckpt.state.optimizer_live import (
    InAttributes,
    Live,
    Own,
    Reading,
    check_face,
    class_name,
    counted_aside,
    inner_optimizers,
    is_given,
    is_told,
    kept_aside,
    live_of,
    shares_state,
)
from dist_ckpt.state.optimizer_names import (
    BESIDE,
    Renamed,
    forward,
    how_to_skip,
    in_live_names,
    neighbours,
    one_group_each,
    shared_out,
    taken_apart,
    without_neighbours,
)
from dist_ckpt.state.part import Captured, Stored, Targets, TensorSpec, is_dry
from dist_ckpt.state.resizing import grown_moment, live_copy
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import StatefulPart

_log = logging.getLogger("dist_ckpt")


class OptimizerPart:
    """The state and the options of `optimizer`, whose parameters are those of `models`.

    Restoring makes the state exactly the stored one and sets every stored option of every group
    in the live group dicts, which schedulers hold. An option that only this program knows keeps
    its value. Parameters that belong to no model are called `group{i}.param{j}`. An optimizer with
    a `state_dict` or a `load_state_dict` of its own, or with hooks on them, is asked and given by
    these.

    Args:
        optimizer: the live one, or a list or dict of several.
        models: where its parameters have their names from.
        name: of the part, for messages.
        prefix: what all names begin with; an optimizer inside of another one has one.

    Raises:
        UsageError: its state cannot be kept.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        models: Sequence[ModelPart] = (),
        name: str = "optimizer",
        prefix: str = "",
    ) -> None:
        if isinstance(optimizer, Mapping) and any(
            isinstance(key, torch.Tensor) for key in optimizer
        ):
            optimizer = list(optimizer.values())  # each by its parameter, which has a name itself
        self.optimizer = optimizer
        self.name = name
        self._prefix = prefix
        self._said = False
        self._models = tuple(models)
        several = isinstance(optimizer, Mapping | list | tuple)
        if not several:
            check_face(optimizer, name)
        self._several = several
        # In this order: `_live` goes by `_one_each`, and what lies beside is found by `_live`.
        self._one_each = self._members_of_one()
        if self._one_each:
            self._class = "+".join(sorted({class_name(each) for each in self._one_each}))
        else:
            self._class = "" if several else class_name(optimizer)
        self._own = Own(optimizer, name, prefix)
        self._beside = self._parts_beside()
        live = self._live
        if live is not None and live.steps_alone and not prefix:
            for model in self._models:
                for each in self.optimizers:
                    model.stepped_by(each)

    @property
    def _live(self) -> Live | None:
        if self._one_each:
            return InAttributes(self._one_each, self.name, alone=True, inside=True)
        # Anew each time: a hook may be registered at any time.
        return None if self._several else live_of(self.optimizer, self.name)

    def _members_of_one(self) -> list[Optimizer]:
        """Return the optimizers if each of them steps a single parameter that has a name.

        So it is where they step in the backward pass. Together they are one optimizer: which of
        them has which place says nothing, and no other program stores it.
        """
        if not self._several:
            return []
        members = list(inner_optimizers(self.optimizer).values())
        listed = [[p for group in each.param_groups for p in group["params"]] for each in members]
        flat = [parameter for each in listed for parameter in each]
        named = parameter_names(self._models, flat)
        alone = all(len(each) == 1 and id(each[0]) in named for each in listed)
        # Of what two of them step there are two states, and one name for both.
        distinct = len({id(parameter) for parameter in flat}) == len(flat)
        asked = any(is_told(each) or is_given(each) for each in members)
        return members if members and alone and distinct and not asked else []

    @property
    def optimizers(self) -> Iterator[Any]:
        """The optimizers that were given: one, or those of the list or dict."""
        if self._one_each:
            yield from self._one_each
        elif self._live is not None:
            yield self.optimizer
        else:
            for part in self._beside:
                yield from part.optimizers

    def capture(self) -> Captured:
        """Return the live state tensors, and options and other state values encoded."""
        self._tell_aside()
        written = Capture(self.name)
        self.write_to(written)
        live = self._live
        alone = live is not None and live.steps_alone
        return Captured(
            written.tensors,
            written.objects,
            # Options may be tensors too, but those are a scheduler's to change, at any time.
            stepped=frozenset(written.stepped if alone else ()),
            versioned=frozenset(written.groups),
        )

    def _tell_aside(self) -> None:
        if self._said or not isinstance(self.optimizer, Optimizer) or is_told(self.optimizer):
            return
        for names, what, where in (
            (kept_aside(self.optimizer), "keeps tensors of its parameters", "state[parameter]"),
            (counted_aside(self.optimizer), "counts or draws", "a group (a generator: as a part)"),
        ):
            if names and not is_dry():
                self._said = True
                _log.warning(
                    "part %r: %s %s in %s, which its state_dict() does not tell, so they are not "
                    "stored: keep them in %s, or tell them there",
                    self.name,
                    type(self.optimizer).__qualname__,
                    what,
                    ", ".join(names),
                    where,
                )

    def targets(self, stored: Stored) -> Targets:
        """Return a tensor for each stored one: laid out as it was, in the stored dtype."""
        if self._is_one_value(stored):
            return StatefulPart(self.optimizer, name=self.name).targets(stored)
        given, back = self._in_this_form(stored)
        if set(given.objects) == {VALUE}:
            # One line that says it, instead of all the names that have no partner.
            other = "a value that has not the form of an optimizer's state"
            return Targets(unlike=[f"{self.name}: stored is {other}. {how_to_skip(self.name)}"])
        found = Targets()
        names: set[str] = set()
        self.find_in(given, found, names)
        tensors = {back.get(name, name): tensor for name, tensor in found.tensors.items()}
        known = {back.get(name, name) for name in names}
        absent = {back.get(name, name) for name in found.unexpected}
        unknown = (stored.tensors.keys() - tensors.keys()) | (stored.objects.keys() - known)
        unexpected = sorted(unknown | absent)
        return replace(found, tensors=tensors, unexpected=unexpected)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the optimizer's state exactly what is stored, and set the options of its groups."""
        if self._is_one_value(stored):
            StatefulPart(self.optimizer, name=self.name).restore(stored, tensors)
            return
        stored, back = self._in_this_form(stored)
        tensors = forward(tensors, back) if back else tensors
        # Groups are matched anew: nothing is kept from `targets`, which a dry run may call.
        live = self._live
        if live is not None:
            told, _ = self._read()
            new = Reading(self._prefix)
            for prefix, (view, content) in told.optimizers.items():
                fit = _OptimizerFit.of(view, stored, self.name)
                new.optimizers[prefix] = (view, fit.content(tensors, content))
            new.further = self._own.read(stored, tensors, told)
            # From here on nothing can fail where the optimizer is torch's own.
            live.write(new)
            self._own.set_mode(stored)
        for part in self._beside:
            if part.is_in(stored):
                part.restore(stored, tensors)

    def _is_one_value(self, stored: Stored) -> bool:
        # Wrappers that are no optimizers by class were stored like anything with a state dict.
        old = VALUE in stored.objects and not self._several
        return old and not isinstance(self.optimizer, Optimizer)

    def _in_this_form(self, stored: Stored) -> tuple[Stored, Mapping[str, str]]:
        """Return what is stored as of one or of several optimizers, as many as there are now.

        With it the names in the checkpoint of all that it has under another.
        """
        # Inside of another: that one has brought all names into this form.
        if self._prefix:
            return stored, {}
        several = any(name.startswith(BESIDE) for name in (*stored.tensors, *stored.objects))
        if not (self._several or several or _is_copy(stored)):
            return stored, {}
        renamed = taken_apart(stored) if _is_copy(stored) else Renamed(stored)
        if not self._beside:
            renamed = renamed.then(without_neighbours)
            renamed = renamed.then(one_group_each) if self._one_each else renamed
        # At the same places each takes its own, and nothing has to be shared out.
        elif self._several and neighbours(renamed.stored) != {part.place for part in self._beside}:
            views = [view for part in self._beside if (view := part.view()) is not None]
            one = renamed.then(without_neighbours)
            # Where two names would meet nobody can tell whose they are: they stay as stored.
            if len(views) == len(self._beside) and not neighbours(one.stored):
                renamed = one.then(lambda each: shared_out(each, views, self.name))
        return renamed.stored, renamed.back

    @property
    def place(self) -> str:
        """Where in a list or dict of several this one is."""
        return self._prefix.removeprefix(BESIDE).removesuffix(".")

    def view(self) -> View | None:
        """Return the parameters and groups of an optimizer of torch's form; None of another."""
        if self._live is None:
            return None
        told, _ = self._read()
        return told.optimizers[self._prefix][0] if self._prefix in told.optimizers else None

    def is_in(self, stored: Stored) -> bool:
        """Tell whether `stored` has anything of this optimizer."""
        names = (*stored.tensors, *stored.objects)
        return any(name.startswith(self._prefix) for name in names)

    def _parts_beside(self) -> list[OptimizerPart]:
        """Make a part of each optimizer inside whose state may be told by nobody else."""
        live = self._live
        if live is not None and live.reads_inner:
            return []
        return [
            OptimizerPart(
                inner,
                models=self._models,
                name=self.name,
                prefix=f"{self._prefix}{BESIDE}{path}.",
            )
            for path, inner in inner_optimizers(self.optimizer).items()
            if not shares_state(self.optimizer, inner)
        ]

    def _read(self) -> tuple[Reading, Mapping[str, torch.Tensor]]:
        """Return what the optimizer keeps now, and the parameters of the face by name."""
        assert self._live is not None
        # A walk, but not for torch's own; an optimizer inside may have others than the face.
        inner = inner_optimizers(self.optimizer).values()
        faces = self._one_each or [self.optimizer, *inner]
        groups = [group for face in faces for group in face.param_groups]
        names = parameter_names(
            self._models, (parameter for group in groups for parameter in group["params"])
        )
        told = self._live.read(names, self._prefix)
        if self._prefix in told.optimizers:
            return told, told.optimizers[self._prefix][0].parameters
        return told, View.of(self.optimizer.param_groups, names).parameters

    def write_to(self, written: Capture) -> None:
        """Add all that this optimizer keeps to what is written down of the part."""
        before = set(written.tensors) if self._beside else ()
        if self._live is not None:
            told, parameters = self._read()
            for view, content in told.optimizers.values():
                write_down(view, content, written, cls=self._class)
            self._own.write(told, parameters, written)
        told_of = [t for name, t in written.tensors.items() if name not in before]
        mine = {address(tensor) for tensor in told_of} if self._beside else set()
        for part in self._beside:
            # Where the face tells nothing by itself, and what the face leaves out.
            if self._live is None or not is_told(self.optimizer) or not part.is_told_in(mine):
                part.write_to(written)

    def is_told_in(self, memory: set[tuple[int, int]]) -> bool:
        """Tell whether all that this optimizer keeps now lies in `memory`, see `address`."""
        told, _ = self._read()
        kept = [
            value
            for _, content in told.optimizers.values()
            for entry in content.state.values()
            for value in optimizer_entries(entry).values()
            if isinstance(value, torch.Tensor)
        ]
        return all(address(value) in memory for value in kept)

    def find_in(self, stored: Stored, found: Targets, known: set[str]) -> None:
        """Add the targets of this optimizer, and the names of objects that have a place in it."""
        live = self._live
        if live is not None:
            for face in (self.optimizer, *inner_optimizers(self.optimizer).values()):
                show_classes(type(face))
            told, parameters = self._read()
            for view, content in told.optimizers.values():
                fit = _OptimizerFit.of(view, stored, self.name)
                tensors, objects = fit.targets(content.state, in_place=live.in_place)
                found.tensors.update(tensors)
                found.resized.update(fit.resized(tensors))
                known |= objects
                found.missing.extend(fit.match.missing)
                found.unexpected.extend(fit.unexpected)
                found.unlike.extend(fit.unlike(self._class, content.options))
            self._own.find(stored, found, known, told=told, parameters=parameters)
        for part in self._beside:
            if part.is_in(stored):
                part.find_in(stored, found, known)


def _is_copy(stored: Stored) -> bool:
    if set(stored.objects) != {VALUE}:
        return False
    value = parse_document(stored.objects[VALUE], VALUE)
    return isinstance(value, dict) and value.keys() >= {"state", "param_groups"}


# How what is stored of one optimizer fits a live one, and the values that come of it.


# Options without which an optimizer of torch is another one; no release adds them to a class.
_TELLING = frozenset(
    {"betas", "momentum", "alpha", "rho", "lr_decay", "momentum_decay", "etas", "lambd"}
)
_AS_IT_IS: Mapping[str, str] = {}


@dataclass(frozen=True)
class _OptimizerFit:
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
    def of(cls, view: View, given: Stored, part: str) -> _OptimizerFit:
        """Match groups.

        Raises:
            IntegrityError: a stored group is malformed.
            IncompatibleError: the state numbers its parameters, and these do not fit.
        """
        stored, back = given, _AS_IT_IS
        groups = _stored_groups(view, stored, part)
        # Renamed only where a name has no live parameter: those that fit as they are stay.
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
        met: dict[str, torch.Tensor] = {}
        # One tensor that is the option of several groups has the name of each, the first one first.
        again = [name for pair in self.notes.same.items() for name in reversed(pair)]
        one = {name: self._one(tensors[name], name, met) for name in again if name in tensors}
        tensors = {**tensors, **one}
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
                value = values[name] if name in values else self._one(tensors[name], name, met)
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

    def _one(self, tensor: torch.Tensor, name: str, met: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return `tensor`, or of one that several parameters had that which was met before."""
        # It goes on for all of them where one of them writes to it, as a counter.
        one = met.setdefault(self.notes.same.get(name, name), tensor)
        alike = (one.shape, one.dtype, one.device) == (tensor.shape, tensor.dtype, tensor.device)
        return one if alike else tensor

    def unlike(self, cls: str, live: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Tell whether another optimizer wrote this than the one of class `cls`.

        Args:
            cls: what is live, as `package.Class`.
            live: its options by group.
        """
        theirs = {option for group in self.groups.values() for option in options_of(group)}
        ours = {option for options in live.values() for option in options}
        # Both ways: what only one of them has may be an option of a newer release of the class.
        apart = bool(theirs - ours and ours - theirs)
        if apart and not self.notes.classes and _TELLING & (theirs ^ ours):
            has, lacks = (", ".join(sorted(each)) for each in (theirs - ours, ours - theirs))
            return [f"{self.part}: saved by what has {has} in its groups and not {lacks}, of {cls}"]
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
        # By type as well: to Python 1, 1.0 and True are equal, as options they are not.
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
