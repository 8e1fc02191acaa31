"""Parts that are one Python value: anything with a state dict, schedulers, and plain values."""

from __future__ import annotations

import inspect
import logging
import re
from argparse import Namespace
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from copy import copy
from dataclasses import dataclass, replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    UsageError,
    describe,
    is_refusal,
)
from dist_ckpt.state.decoding import decode, layouts_in, needs_classes, parse_document, references
from dist_ckpt.state.encoding import encode, fillable
from dist_ckpt.state.layout import alias_of, dtype_of, empty_beside, is_wrapped, memory_of
from dist_ckpt.state.merging import Borrowed, Merging, held_containers
from dist_ckpt.state.module_state import partners
from dist_ckpt.state.part import Captured, Part, Stored, Targets, TensorSpec, is_dry
from dist_ckpt.state.registry import REGISTRY
from dist_ckpt.state.resizing import live_copy
from dist_ckpt.state.slots import CallersSlot, OwnSlot, Reshard, Slot
from dist_ckpt.state.value_fit import VALUE, ValueFit, beside, fit_value, is_learned

_log = logging.getLogger("dist_ckpt")
# What None, and a dict or list without content, are when they are stored.
_NOTHING = frozenset({b"null", b"{}", b"[]", b'{"!":"ordered_dict","v":[]}'})
_STATE_DICT = ("state_dict", "load_state_dict")
_STATE = ("get_state", "set_state")
# Of these kinds a value stays itself and takes the content of the loaded one.
_CHANGES = (
    *(MutableMapping, MutableSequence, MutableSet, np.ndarray, torch.Tensor),
    *(Namespace, SimpleNamespace, BytesIO),
)


@runtime_checkable
class Stateful(Protocol):
    """Anything that can describe itself and take the description back."""

    def state_dict(self) -> Any:
        """Return the state, made of plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state that `state_dict` returned."""
        ...


@runtime_checkable
class Settable(Protocol):
    """The same by other names."""

    def get_state(self) -> Any:
        """Return the state, made of plain values and tensors."""
        ...

    def set_state(self, state: Any, /) -> Any:
        """Take a state that `get_state` returned."""
        ...


def keeps_state(value: object) -> TypeGuard[Stateful | Settable]:
    """Tell whether `value` is to be asked for its state, and not stored as what it is."""
    if isinstance(value, Stateful):
        return True
    # Of a registered type the program has said what it is made of.
    return isinstance(value, Settable) and REGISTRY.by_type(type(value)) is None


class ValuePart:
    """A plain value, stored as one object named `value` and the tensors in it.

    A restore changes in place what can change (`dist_ckpt.state.merging`), so that whoever holds
    it sees it: tensors at any depth are filled where they lie. Those whose memory somebody else
    holds, as the entries of a state dict, must have the stored names, shapes and dtypes. A
    checkpoint that has the tensors by their own names (a module was saved, or another program wrote
    it) fits as well. A per-rank value keeps its tensors inside the object; at another world size
    `reshard` makes each rank's value out of those of all ranks that saved.

    Args:
        value: what to keep.
        name: of the part, for messages.
        per_rank: whether it is this rank's own.
        reshard: see `PerRank`.
    """

    def __init__(
        self,
        value: object,
        *,
        name: str,
        per_rank: bool = False,
        reshard: Reshard | None = None,
    ) -> None:
        self._slot: Slot = OwnSlot(value)
        self.name = name
        self._per_rank = per_rank
        self._reshard = reshard
        self._fitted: tuple[Stored, ValueFit] | None = None
        self._borrowed = Borrowed(value)

    @property
    def value(self) -> Any:
        """The live value."""
        return self._slot.get()

    @value.setter
    def value(self, value: object) -> None:
        """Put another one in its place."""
        self._slot.put(value)

    def lies_in(self, home: Mapping[str, Any]) -> None:
        """Take the value from `home`, which has it under the name of the part, from now on."""
        self._slot = CallersSlot(home, self.name)

    def is_empty(self) -> bool:
        """Tell whether the value is a dict or a list without content."""
        return isinstance(self.value, (dict, list)) and not self.value

    def has_names(self) -> bool:
        """Tell whether the value is a dict of somebody else's tensors, as a state dict is."""
        live = self.value
        return not self._per_rank and isinstance(live, dict) and id(live) in held_containers(live)

    @property
    def per_rank(self) -> bool:
        """Whether the value is each rank's own."""
        return self._per_rank

    def capture(self) -> Captured:
        """Return the value encoded, and the tensors in it.

        Raises:
            UsageError: it cannot be stored, or is the state dict of a module that has other
                tensors now.
        """
        stale = self._borrowed.stale()
        if stale is not None:
            raise UsageError(
                f"{self.name} is the state dict of a module that has another tensor for {stale!r} "
                "by now (it was moved, or it makes new ones): give the module itself as the part"
            )
        value = self._read()  # once: a state_dict may be costly or count its calls
        if self._per_rank:
            # Names of tensors are shared by all ranks, so these tensors go inside.
            return Captured({}, {VALUE: encode(value, path=self.name)}, per_rank=True)
        tensors: dict[str, torch.Tensor] = {}
        data = encode(value, path=self.name, tensors=tensors, prefix=VALUE)
        return Captured(tensors, {VALUE: data})

    def targets(self, stored: Stored) -> Targets:
        """Return the live tensors of the stored names, and fresh ones for the others.

        Raises:
            IncompatibleError: values of each rank, saved by another number of ranks, and nothing
                that could reshard them; or a stored value that this program cannot make.
            UsageError: the live value lies where no other one can be put.
        """
        if VALUE not in stored.objects:
            named = self._by_names(stored)
            if named is not None:
                return named.targets
            return Targets({}, [VALUE], sorted(stored.tensors.keys() | stored.objects.keys()))
        note = None
        if self._is_resharded(stored):
            # Asked for now, while nothing live has changed; the hook itself runs in `restore`.
            self._saved_values(stored)
            note = (
                f"{self.name} was kept per rank by {stored.saved_world_size} ranks and resharded "
                f"for {stored.world_size}"
            )
        data = stored.objects[VALUE]
        wanted = references(data, path=self.name)
        if needs_classes(data):
            self.capture()  # the live value shows the classes that the stored one may be made of
        if not wanted:
            # What cannot be decoded here is found before anything changes.
            self._check(decode(data, tensors={}, path=self.name), stored)
        if self._slot.fixed and not isinstance(self.value, _CHANGES):
            raise UsageError(
                f"part {self.name!r} is a plain value in a mapping that cannot change, so the "
                "loaded one would be lost: give a dict or a TrainState"
            )
        fit = self._fit(stored, wanted)
        others = (stored.tensors.keys() - set(wanted)) | (stored.objects.keys() - {VALUE})
        if fit.exchanged:
            names = ", ".join(f"{self.name}/{name}" for name in fit.exchanged)
            note = f"of another shape or dtype, so another tensor lies there now: {names}"
        unexpected = sorted(others.union(fit.unexpected))
        return Targets(fit.tensors, fit.missing, unexpected, note, resized=fit.resized)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the stored value in the place of the live one."""
        if VALUE not in stored.objects:
            named = self._by_names(stored)
            if named is not None:
                named.put(tensors)
        elif self._is_resharded(stored):
            self._write(self._resharded(stored), ())
        else:
            data = stored.objects[VALUE]
            fit = self._fit(stored, references(data))
            value = decode(data, tensors=fit.as_learned(tensors), path=self.name)
            self._write(self._as_mine(value) if stored.is_foreign else value, fit.held)
        # Or what was read would stay in memory until the next load.
        self._fitted = None

    def goes_first(self, stored: Stored) -> bool:
        """Tell whether the restore asks code of the program, and needs no tensor for it.

        What that refuses is then found before a tensor of the state has changed.
        """
        return VALUE in stored.objects and self._is_resharded(stored)

    def _fit(self, stored: Stored, wanted: Sequence[str]) -> ValueFit:
        if self._per_rank:
            return ValueFit()  # its tensors are inside
        # Whose dicts they are cannot be told any more when targets hold the memory of them.
        if self._fitted is None or self._fitted[0] is not stored:
            stays = isinstance(self._slot, CallersSlot)
            fit = fit_value(self._read(), stored, wanted, path=self.name, stays=stays)
            self._fitted = (stored, fit)
        return self._fitted[1]

    def _check(self, value: Any, stored: Stored) -> None:
        """Raise if `value` cannot be taken, as far as that can be known."""

    def _by_names(self, stored: Stored) -> _ByNames | None:
        return None if self._per_rank else by_names(self._read(), stored, self.name)

    def _as_mine(self, value: Any) -> Any:
        """Return what another program stored in the form of the live value."""
        return value

    def _is_resharded(self, stored: Stored) -> bool:
        return self._per_rank and stored.world_size != stored.saved_world_size

    def _saved_values(self, stored: Stored) -> list[Any]:
        """Return the value of every rank that saved."""
        if self._reshard is None:
            # Never one rank's value for all, and never none: both lose data positions silently.
            raise IncompatibleError(
                f"{self.name} is kept per rank: it was saved by {stored.saved_world_size} ranks "
                f"and there are {stored.world_size} now; run with as many, give "
                "PerRank(..., reshard=...) a function that makes the new values, or leave it out"
            )
        return [
            decode(objects[VALUE], tensors={}, path=f"{self.name} of rank {rank}")
            for rank, objects in enumerate(stored.by_rank())
        ]

    def _resharded(self, stored: Stored) -> Any:
        values = self._saved_values(stored)
        assert self._reshard is not None  # `_saved_values` raised
        try:
            return self._reshard(values, stored.rank, stored.world_size)
        except CheckpointError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(
                f"{self.name}: its reshard hook failed on rank {stored.rank} of "
                f"{stored.world_size}: {describe(error)}"
            ) from error

    def _read(self) -> object:
        return self.value

    def _write(self, value: Any, held: Collection[int]) -> None:
        self.value = Merging(held).merged(self.value, value)


class StatefulPart(ValuePart):
    """Anything with `state_dict` and `load_state_dict`: what the one returns, the other gets.

    So of `get_state` and `set_state`, where it has not the former.

    One that has `check_state_dict` is asked by that first, before anything of the state changes: it
    raises if it would refuse, and changes nothing.
    """

    def __init__(
        self,
        value: Stateful | Settable,
        *,
        name: str,
        per_rank: bool = False,
        reshard: Reshard | None = None,
    ) -> None:
        super().__init__(value, name=name, per_rank=per_rank, reshard=reshard)
        self._stateful = value
        by_dict = isinstance(value, Stateful)
        self._gives, self._takes = _STATE_DICT if by_dict else _STATE
        self._said_empty = False

    def capture(self) -> Captured:
        """Return what `state_dict` returned, encoded, and the tensors in it."""
        captured = super().capture()
        nothing = captured.objects[VALUE] in _NOTHING
        if nothing and not self._said_empty and not is_dry():
            self._said_empty = True
            kind = type(self._stateful).__qualname__
            _log.warning(
                "part %r: %s.%s() returned nothing, so nothing is stored for it",
                self.name,
                kind,
                self._gives,
            )
        return captured

    def goes_first(self, stored: Stored) -> bool:
        """Return as `ValuePart.goes_first`."""
        return VALUE in stored.objects and not references(stored.objects[VALUE], path=self.name)

    def _check(self, value: Any, stored: Stored) -> None:
        check = getattr(self._stateful, "check_state_dict", None)
        # What its hook will make of the values of all ranks is not there yet.
        if check is not None and not self._is_resharded(stored):
            self._ask(check, value)

    def _fit(self, stored: Stored, wanted: Sequence[str]) -> ValueFit:
        # Fresh even where a live one would fit: a load_state_dict may compare old with new.
        live = fillable(self._read(), path=self.name, prefix=VALUE) if wanted else {}
        if any(each.is_meta for each in live.values()):
            self.capture()  # which says that there is nothing to hold the values
        specs = stored.tensors
        fit = ValueFit(missing=[name for name in wanted if name not in specs])
        node = parse_document(stored.objects[VALUE], self.name) if wanted else None
        layouts = dict(layouts_in(node))
        for name in wanted:
            if name in specs:
                rule = stored.resize(name) if name in live else None
                if name in live and is_learned(live[name]):
                    fit.learned[name] = live[name]
                if rule is None or tuple(live[name].shape) == specs[name].shape:
                    fit.tensors[name] = beside(live.get(name), name, stored, layouts)
                else:
                    fit.tensors[name] = live_copy(live[name], dtype_of(specs[name].dtype))
                    fit.resized[name] = rule
        return fit

    def _by_names(self, stored: Stored) -> _ByNames | None:
        return None  # only it knows what its state dict is made of

    def _as_mine(self, value: Any) -> Any:
        return _as_live(value, self._read())

    def _read(self) -> object:
        found: object = getattr(self._stateful, self._gives)()
        return found

    def _write(self, value: Any, held: Collection[int]) -> None:
        self._ask(getattr(self._stateful, self._takes), value)

    def _ask(self, method: Callable[[Any], Any], value: Any) -> None:
        try:
            method(value)
        except CheckpointError:
            raise  # a part of ours, which said it better
        except Exception as error:
            if not is_refusal(error):
                raise
            kind = type(self._stateful).__qualname__
            raise IncompatibleError(
                f"{self.name}: {kind}.{self._takes} refused what was saved: {describe(error)}"
            ) from error


def is_taken_whole(part: Part) -> bool:
    """Tell whether `part` is given its value as it was saved, and not by the names in it.

    Only an object knows what its state is made of; and a dict that is empty has no names yet.
    """
    if not isinstance(part, ValuePart) or part.per_rank:
        return False
    return isinstance(part, StatefulPart) or part.is_empty()


# Loading named tensors into a plain value: a state dict takes what a module, or DCP, has saved.


@dataclass(frozen=True, slots=True)
class _ByNames:
    """How the names of a plain value and those of a checkpoint fit.

    Attributes:
        targets: where the stored bytes go.
        stored: the content of the checkpoint.
        found: the stored name of each live one.
        places: the container and the key of each leaf that can be replaced, by live name.
        path: what the value is called, for messages.
    """

    targets: Targets
    stored: Stored
    found: Mapping[str, str]
    places: Mapping[str, tuple[Any, Any]]
    path: str

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put what was read into the containers; tensors that were filled in place stay."""
        for name, partner in self.found.items():
            if name not in self.places:
                continue
            container, key = self.places[name]
            live = container[key]
            if partner in self.stored.objects:
                data = self.stored.objects[partner]
                container[key] = decode(data, tensors=tensors, path=f"{self.path}.{name}")
            elif partner in tensors and (not isinstance(live, torch.Tensor) or live.is_meta):
                container[key] = tensors[partner]


def by_names(value: object, stored: Stored, path: str) -> _ByNames | None:
    """Find where named tensors and objects go in `value`; None if it is no container.

    Args:
        value: the live value; its names are the keys and list positions, joined by dots.
        stored: what there is.
        path: what the value is called, for messages.

    Raises:
        UsageError: the value holds something that cannot be stored.
        IntegrityError: a stored object is malformed.
        IncompatibleError: a stored object cannot be made in this program.
    """
    if not isinstance(value, (dict, list)):
        return None
    live = {
        name.removeprefix(f"{VALUE}."): tensor
        for name, tensor in fillable(value, path=path, prefix=VALUE).items()
    }
    places = {
        name: (container, key)
        for name, container, key in _leaves(value, ())
        if not is_wrapped(container[key])  # which is filled by what it is made of
    }
    names = dict.fromkeys([*places, *live])
    known = stored.tensors.keys() | stored.objects.keys()
    found = partners(names, known, is_foreign=stored.is_foreign)
    targets = Targets()
    used: set[str] = set()
    for name in names:
        partner = found.get(name)
        if partner is None or (name in live and partner not in stored.tensors):
            targets.missing.append(name)
        elif partner in stored.tensors:
            spec = stored.tensors[partner]
            targets.tensors[partner] = alias_of(live[name]) if name in live else _fresh(spec)
            if name in live and (rule := stored.resize(partner)) is not None:
                targets.resized[partner] = rule
            used.add(partner)
        else:
            data = stored.objects[partner]
            inner = references(data, path=f"{path}.{partner}")
            if not inner:  # so that nothing is changed when it cannot be made
                decode(data, tensors={}, path=f"{path}.{partner}")
            targets.tensors.update({each: _fresh(stored.tensors[each]) for each in inner})
            used.update((partner, *inner))
    # A name whose memory is filled under another one is not missing.
    filled = {memory_of(live[name]) for name in found if name in live}
    targets.missing[:] = [
        name for name in targets.missing if name not in live or memory_of(live[name]) not in filled
    ]
    targets.unexpected.extend(sorted((stored.tensors.keys() | stored.objects.keys()) - used))
    return _ByNames(targets, stored, found, places, path)


def _leaves(value: Any, steps: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the container and the key of all that is no dict and no list itself."""
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, item in items:
        name = (*steps, str(key))
        if isinstance(item, (dict, list)):
            yield from _leaves(item, name)
        elif not isinstance(item, tuple):  # which cannot take another member
            yield ".".join(name), value, key


def _fresh(spec: TensorSpec) -> torch.Tensor:
    return empty_beside(torch.empty(0), spec)


def _as_live(value: Any, live: Any) -> Any:
    """Return `value`, which DCP took apart, with the keys and the tuples that `live` has.

    DCP makes texts of keys and lists of tuples, and does not say what they were.
    """
    if isinstance(value, list):
        if not (isinstance(live, (list, tuple)) and len(live) == len(value)):
            return value
        items = [_as_live(item, other) for item, other in zip(value, live, strict=True)]
        return tuple(items) if type(live) is tuple else items
    if type(value) is not dict or not isinstance(live, Mapping):
        return value
    keys = {str(key): key for key in live}
    return {
        keys.get(key, key): _as_live(item, live.get(keys.get(key, key)))
        for key, item in value.items()
    }


# Learning rate schedulers: stateful, but their `load_state_dict` takes anything.


KIND = "kind"
"""The name of the object that says of which classes the schedule is made."""

_NESTED = "_schedulers"
# Kept by some versions of torch and not by others, with no meaning for the schedule.
_INCIDENTAL = frozenset({"verbose"})
# SWALR of older torch keeps its strategy as a function, which cannot be stored; that of newer torch
# has the name of it in its state, and so has every checkpoint.
_FUNCTION, _STRATEGY = "anneal_func", "_anneal_strategy"
_FUNCTIONS = {"cos": "_cosine_anneal", "linear": "_linear_anneal"}
_TORCH = {
    name: each
    for name, each in {**vars(lr_scheduler), "SWALR": SWALR}.items()
    if isinstance(each, type) and issubclass(each, LRScheduler)
}


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


# What makes a schedule the one that it is: an attribute of another name is the program's own.
_SETTINGS = set().union(*map(_arguments, _TORCH.values())) | {
    *("last_epoch", "base_lrs", "max_lrs", "min_lrs", "lr_lambdas")
}


class SchedulerPart(StatefulPart):
    """A scheduler, which refuses the state of one of another kind.

    torch's own schedulers put every entry that they are given into their attributes: the state of a
    cosine would load into a step schedule, which then starts again from its first step. Those that
    are made of others (`SequentialLR`, `ChainedScheduler`) are of a kind with those made of the
    same ones in the same order.
    """

    def capture(self) -> Captured:
        """Return the state, and of which classes the schedule is made."""
        captured = super().capture()
        kind = encode(kind_of(self._stateful), path=f"{self.name}.{KIND}")
        return replace(captured, objects={**captured.objects, KIND: kind})

    def targets(self, stored: Stored) -> Targets:
        """Return as `ValuePart.targets`.

        Raises:
            IncompatibleError: the stored scheduler is of another kind than this one.
            IntegrityError: what is stored of its kind is none.
        """
        objects = dict(stored.objects)
        kind = objects.pop(KIND, None)
        # A plain value is one object: it would tell of this one as unexpected.
        targets = super().targets(replace(stored, objects=objects))
        if VALUE in objects:
            data = objects[VALUE]
            # Kinds are told by names of settings, before any tensor is read.
            blank = {name: torch.empty(0) for name in references(data, path=self.name)}
            saved = decode(data, tensors=blank, path=self.name)
            theirs = None if kind is None else decode(kind, tensors={}, path=self.name)
            if not isinstance(theirs, str | None):
                raise IntegrityError(
                    f"stored {self.name}.{KIND} is no name of a schedule", kind=ErrorKind.MALFORMED
                )
            self._check_kind(saved, theirs)
        return targets

    def _read(self) -> object:
        return _with_names(super()._read())

    def _write(self, value: Any, held: Collection[int]) -> None:
        super()._write(value, held)
        _take_functions(self._stateful)

    def _check_kind(self, saved: Any, kind: str | None) -> None:
        live, ours = self._read(), kind_of(self._stateful)
        if not isinstance(saved, dict) or not isinstance(live, dict):
            return
        apart = dict(_differences(saved, live, self._stateful, ""))
        # What moved to a class of another name is judged by its settings, as long as neither name
        # is one of torch's: there a name says what the schedule does.
        renamed = not apart and isinstance(kind, str) and not _names_torch(kind, ours)
        if kind == ours or renamed or (kind is None and not apart):
            return
        what = f"the settings of a {kind}"
        if apart:
            place, (more, less) = next(iter(apart.items()))
            what = f"{_listed(more)} and without {_listed(less)}" + (
                f" at {place}" if place else ""
            )
        raise IncompatibleError(
            f"{self.name}: the checkpoint holds a scheduler with {what}, so it is not of the kind "
            f"of this {ours}; build the {kind or 'one'} that was saved, or leave the part out to "
            "start a new schedule"
        )


def kind_of(scheduler: object) -> str:
    """Return of which classes a schedule is made: `SequentialLR(LinearLR, CosineAnnealingLR)`."""
    inner = getattr(scheduler, _NESTED, None)
    nested = ", ".join(map(kind_of, inner)) if isinstance(inner, list | tuple) else ""
    return type(scheduler).__name__ + (f"({nested})" if nested else "")


def _with_names(state: object) -> object:
    """Return the state of a schedule with the names of strategies in the place of functions."""
    if not isinstance(state, dict):
        return state
    found, function = copy(state), state.get(_FUNCTION)
    for name, method in _FUNCTIONS.items():
        # One of the program's own stays, and is refused by its name.
        if function is not None and function is getattr(SWALR, method, None):
            del found[_FUNCTION]
            found[_STRATEGY] = name
    if isinstance(found.get(_NESTED), list):
        found[_NESTED] = [_with_names(each) for each in found[_NESTED]]
    return found


def _take_functions(scheduler: object) -> None:
    """Have the strategies that were loaded by name used, where torch does not see to that."""
    for each in getattr(scheduler, _NESTED, ()):
        _take_functions(each)
    if isinstance(scheduler, SWALR):
        function = _FUNCTIONS.get(vars(scheduler).get(_STRATEGY, ""))
        if function is not None:
            setattr(scheduler, _FUNCTION, getattr(scheduler, function))


def _differences(
    saved: Mapping[Any, Any], live: Mapping[Any, Any], scheduler: object, place: str
) -> Iterator[tuple[str, tuple[set[str], set[str]]]]:
    """Yield where two states have other settings: those of the saved one, those of the live one."""
    known = _SETTINGS | _arguments(type(scheduler))
    theirs, ours = _settings(saved) & known, _settings(live) & known
    if theirs != ours:
        yield place, (theirs - ours, ours - theirs)
    their_nested, our_nested = saved.get(_NESTED), live.get(_NESTED)
    inner = getattr(scheduler, _NESTED, None)
    if not isinstance(their_nested, list) or not isinstance(our_nested, list):
        if their_nested is not None or our_nested is not None:
            yield place, ({_NESTED} & saved.keys(), {_NESTED} & live.keys())
        return
    if len(their_nested) != len(our_nested):
        yield place, ({f"{len(their_nested)} schedulers"}, {f"{len(our_nested)} schedulers"})
    for i, (one, other) in enumerate(zip(their_nested, our_nested, strict=False)):
        if isinstance(one, dict) and isinstance(other, dict) and inner:
            yield from _differences(one, other, inner[i], f"{place}{_NESTED}[{i}]")


def _settings(state: Mapping[Any, Any]) -> set[str]:
    # Private entries are how a version of torch works, not what the schedule is.
    return {str(key) for key in state if not str(key).startswith("_")} - _INCIDENTAL


def _names_torch(*kinds: str) -> bool:
    return any(name in _TORCH for kind in kinds for name in re.findall(r"\w+", kind))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing else"
