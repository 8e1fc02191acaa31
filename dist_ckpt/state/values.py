"""Parts that are one Python value: anything with a state dict, and plain values."""

from __future__ import annotations

from argparse import Namespace
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from functools import singledispatch
from io import BytesIO
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from dist_ckpt.errors import CheckpointError, IncompatibleError, describe, is_refusal
from dist_ckpt.state.layout import empty_beside
from dist_ckpt.state.objects import decode, encode, needs_classes, references
from dist_ckpt.state.part import Captured, Stored, Targets

VALUE = "value"
"""The name of the one object that such a part consists of."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that can describe itself and take the description back."""

    def state_dict(self) -> Any:
        """Return the state, made of plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state that `state_dict` returned."""
        ...


Reshard = Callable[[Sequence[Any], int, int], Any]
"""Called with the saved values by rank, this rank, and the world size; returns this rank's."""


class ValuePart:
    """A plain value, stored as one object named `value` and the tensors in it.

    A restore updates a dict, list, set, array or tensor in place, if the stored one is of its
    type (and shape and dtype), so that whoever holds it sees the change; any other value is
    replaced. A per-rank value keeps its tensors inside the object; at another world size `reshard`
    makes each rank's value out of those of all ranks that saved.
    """

    def __init__(
        self, value: object, *, name: str, per_rank: bool = False, reshard: Reshard | None = None
    ) -> None:
        self.value = value
        self.name = name
        self._per_rank = per_rank
        self._reshard = reshard

    @property
    def per_rank(self) -> bool:
        """Whether the value is each rank's own."""
        return self._per_rank

    def capture(self) -> Captured:
        """Return the value encoded, and the tensors in it."""
        value = self._read()  # once: a state_dict may be costly or count its calls
        if self._per_rank:
            # Names of tensors are shared by all ranks, so these tensors go inside.
            return Captured({}, {VALUE: encode(value, path=self.name)}, per_rank=True)
        tensors: dict[str, torch.Tensor] = {}
        data = encode(value, path=self.name, tensors=tensors, prefix=VALUE)
        return Captured(tensors, {VALUE: data})

    def targets(self, stored: Stored) -> Targets:
        """Return fresh tensors, laid out as the live ones of the same names and shapes.

        Raises:
            IncompatibleError: values of each rank, saved by another number of ranks, and nothing
                that could reshard them.
        """
        if VALUE not in stored.objects:
            return Targets({}, [VALUE], sorted(stored.tensors.keys() | stored.objects.keys()))
        note = None
        if self._is_resharded(stored):
            # Asked for now, while nothing live has changed; the hook itself runs in `restore`.
            self._saved_values(stored)
            note = (
                f"{self.name} was kept per rank by {stored.saved_world_size} ranks and resharded "
                f"for {stored.world_size}"
            )
        wanted = references(stored.objects[VALUE], path=self.name)
        # Fresh even where a live one would fit: a load_state_dict may compare old with new.
        known = wanted or needs_classes(stored.objects[VALUE])
        live = self.capture().tensors if known else {}
        tensors = {}
        for name in wanted:
            if name in stored.tensors:
                spec = stored.tensors[name]
                same = name in live and tuple(live[name].shape) == spec.shape
                like = live[name] if same else torch.empty(0)
                tensors[name] = empty_beside(like, spec)
        missing = [name for name in wanted if name not in stored.tensors]
        others = (stored.tensors.keys() - set(wanted)) | (stored.objects.keys() - {VALUE})
        return Targets(tensors, missing, sorted(others), note)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the stored value in the place of the live one."""
        if VALUE not in stored.objects:
            return
        if self._is_resharded(stored):
            self._write(self._resharded(stored))
        else:
            self._write(decode(stored.objects[VALUE], tensors=tensors, path=self.name))

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

    def _write(self, value: Any) -> None:
        # A parameter is stored as the tensor that it is.
        tensors = isinstance(value, torch.Tensor) and isinstance(self.value, torch.Tensor)
        same = tensors or type(value) is type(self.value)
        self.value = _update(self.value, value) if same else value


class StatefulPart(ValuePart):
    """Anything with `state_dict` and `load_state_dict`: what the one returns, the other gets."""

    def __init__(
        self, value: Stateful, *, name: str, per_rank: bool = False, reshard: Reshard | None = None
    ) -> None:
        super().__init__(value, name=name, per_rank=per_rank, reshard=reshard)
        self._stateful = value

    def _read(self) -> object:
        return self._stateful.state_dict()

    def _write(self, value: Any) -> None:
        try:
            self._stateful.load_state_dict(value)
        except CheckpointError:
            raise  # a part of ours, which said it better
        except Exception as error:
            if not is_refusal(error):
                raise
            kind = type(self._stateful).__qualname__
            raise IncompatibleError(
                f"{self.name}: {kind}.load_state_dict refused what was saved: {describe(error)}"
            ) from error


@singledispatch
def _update(live: object, value: Any) -> object:
    """Return what takes the place of `live`: itself, changed, where its type can be."""
    return value


@_update.register
def _(live: MutableMapping, value: Any) -> object:  # type: ignore[type-arg]
    live.clear()  # and not only updated: keys that were added since must go, and the order counts
    live.update(value)
    return live


@_update.register
def _(live: MutableSequence, value: Any) -> object:  # type: ignore[type-arg]
    live[:] = value
    return live


@_update.register
def _(live: deque, value: Any) -> object:  # type: ignore[type-arg]
    if live.maxlen != value.maxlen:
        return value  # it cannot be changed
    live.clear()
    live.extend(value)
    return live


@_update.register
def _(live: defaultdict, value: Any) -> object:  # type: ignore[type-arg]
    live.default_factory = value.default_factory
    live.clear()
    live.update(value)
    return live


@_update.register
def _(live: array, value: Any) -> object:  # type: ignore[type-arg]
    if live.typecode != value.typecode:
        return value
    live[:] = value
    return live


@_update.register
def _(live: Namespace | SimpleNamespace, value: Any) -> object:
    vars(live).clear()
    vars(live).update(vars(value))
    return live


@_update.register
def _(live: BytesIO, value: Any) -> object:
    live.seek(0)
    live.truncate()
    live.write(value.getbuffer())
    live.seek(value.tell())
    return live


@_update.register
def _(live: MutableSet, value: Any) -> object:  # type: ignore[type-arg]
    live.clear()
    live |= value
    return live


@_update.register
def _(live: np.ndarray, value: Any) -> object:
    same = live.shape == value.shape and live.dtype == value.dtype
    if not same or not live.flags.writeable:
        return value
    live[...] = value  # through every view that the program holds
    return live


@_update.register
def _(live: torch.Tensor, value: Any) -> object:
    if live.shape != value.shape or live.dtype != value.dtype:
        return value
    with torch.no_grad():
        return live.copy_(value)
