"""Learning rate schedulers: stateful, but their `load_state_dict` takes anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import StatefulPart

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
        targets = super().targets(replace(stored, objects=objects))
        if VALUE in objects:
            data = objects[VALUE]
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
