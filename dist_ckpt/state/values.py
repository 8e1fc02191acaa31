"""Parts that are one Python value: anything with a state dict, and plain values."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import (
    Callable,
    Collection,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from io import BytesIO
from types import SimpleNamespace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch

from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError, describe, is_refusal
from dist_ckpt.state.by_names import ByNames, as_live, by_names
from dist_ckpt.state.decoding import layouts_in, parse_document
from dist_ckpt.state.holders import Borrowed
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.state.merging import Merging, held_containers
from dist_ckpt.state.objects import decode, encode, needs_classes, references
from dist_ckpt.state.part import Captured, Part, Stored, Targets, is_dry
from dist_ckpt.state.registry import REGISTRY
from dist_ckpt.state.resizing import live_copy
from dist_ckpt.state.slots import CallersSlot, OwnSlot, Reshard, Slot
from dist_ckpt.state.value_fit import VALUE, ValueFit, beside, fit_value

__all__ = ["VALUE", "Reshard", "Stateful", "StatefulPart", "ValuePart"]


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
            held = self._fit(stored, references(data)).held
            value = decode(data, tensors=tensors, path=self.name)
            self._write(self._as_mine(value) if stored.is_foreign else value, held)
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

    def _by_names(self, stored: Stored) -> ByNames | None:
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
        if check is not None and not self._is_resharded(stored):
            self._ask(check, value)

    def _fit(self, stored: Stored, wanted: Sequence[str]) -> ValueFit:
        # Fresh even where a live one would fit: a load_state_dict may compare old with new.
        live = self.capture().tensors if wanted else {}
        specs = stored.tensors
        fit = ValueFit(missing=[name for name in wanted if name not in specs])
        node = parse_document(stored.objects[VALUE], self.name) if wanted else None
        layouts = dict(layouts_in(node))
        for name in wanted:
            if name in specs:
                rule = stored.resize(name) if name in live else None
                if rule is None or tuple(live[name].shape) == specs[name].shape:
                    fit.tensors[name] = beside(live.get(name), name, stored, layouts)
                else:
                    fit.tensors[name] = live_copy(live[name], dtype_of(specs[name].dtype))
                    fit.resized[name] = rule
        return fit

    def _by_names(self, stored: Stored) -> ByNames | None:
        return None  # only it knows what its state dict is made of

    def _as_mine(self, value: Any) -> Any:
        return as_live(value, self._read())

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
