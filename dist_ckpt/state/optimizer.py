"""An optimizer as a part: moments under the names of their parameters, groups as objects.

How values are named is written in `dist_ckpt.state.optimizer_content`. Where the face has more to
tell than torch's form has room for, `own.<key>` is what its `state_dict` has under another key,
`inner.<path>.` is what begins the names of an optimizer whose `state_dict` lies in there, and
`beside.<attribute>.` those of one inside the face of which the face tells nothing. Nothing here
ever steps an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.groups import View, parameter_names
from dist_ckpt.state.layout import address
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer_content import Capture, optimizer_entries, write_down
from dist_ckpt.state.optimizer_faces import (
    check_face,
    class_name,
    inner_optimizers,
    is_given,
    is_told,
    shares_state,
)
from dist_ckpt.state.optimizer_fit import OptimizerFit
from dist_ckpt.state.optimizer_live import InAttributes, Live, Reading, live_of
from dist_ckpt.state.optimizer_names import (
    BESIDE,
    Renamed,
    forward,
    how_to_skip,
    neighbours,
    one_group_each,
    shared_out,
    taken_apart,
    without_neighbours,
)
from dist_ckpt.state.optimizer_own import Own
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.values import VALUE, StatefulPart
from dist_ckpt.state.wrapped import show_classes


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
        self._models = tuple(models)
        several = isinstance(optimizer, Mapping | list | tuple)
        if not several:
            check_face(optimizer, name)
        self._several = several
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
                fit = OptimizerFit.of(view, stored, self.name)
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
        if self._prefix:
            return stored, {}
        several = any(name.startswith(BESIDE) for name in (*stored.tensors, *stored.objects))
        if not (self._several or several or _is_copy(stored)):
            return stored, {}
        renamed = taken_apart(stored) if _is_copy(stored) else Renamed(stored)
        if not self._beside:
            renamed = renamed.then(without_neighbours)
            renamed = renamed.then(one_group_each) if self._one_each else renamed
        elif self._several and neighbours(renamed.stored) != {part.place for part in self._beside}:
            views = [view for part in self._beside if (view := part.view()) is not None]
            one = renamed.then(without_neighbours)
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
                fit = OptimizerFit.of(view, stored, self.name)
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
