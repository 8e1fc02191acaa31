"""What one rank holds, in boxes of global tensors.

A plain tensor is one box, and what of a DTensor lies here `dist_ckpt.planning.placing` computes;
of other types that torch can shard (ShardedTensor) DCP's own planning tells. The same description
serves saving (what there is to write) and loading (where bytes belong).

A training state hardly changes its structure from save to save, and DCP's planning costs many
times what it costs to see that: a `Describer` asks it only about what is new or changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dist_ckpt.errors import UsageError
from dist_ckpt.format.files import DTYPES, bytes_digest
from dist_ckpt.format.index import Box, Held
from dist_ckpt.format.names import check_tensor_name
from dist_ckpt.planning.placing import boxes_here
from dist_ckpt.staging.arena import reach, view_box
from dist_ckpt.state.layout import (
    dtype_name,
    is_wrapped,
    joined_box,
    joined_of,
    shard_order_of,
    stored_shape,
)

NamedTensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Live tensors by part and name."""


class LocalBox(msgspec.Struct, frozen=True):
    """A box that this rank holds, with the live memory behind it.

    Attributes:
        held: the box.
        memory: the local tensor, without a gradient; its first element is the first one of the
            box. It may be the very tensor of the state.
        stepped: whether only a step of an optimizer of the state changes the memory
            (`dist_ckpt.state.part.Captured.stepped`).
    """

    held: Held
    memory: torch.Tensor
    stepped: bool = False


_Sketch = tuple[object, ...]
"""All that DCP's planning of a tensor depends on: equal sketches are planned alike."""

_Lay = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype]
"""The address of the first element, the bytes of the storage, shape, strides and dtype."""


@dataclass(slots=True)
class _Known:
    """What was planned for one tensor; no box where this rank is not part of its mesh.

    Attributes:
        sketch: what that depended on; None for a type that may know better.
        held: the boxes.
        views: where each of them lies in the local tensor; None for all of it.
        tensor: which object it was; not kept alive, since a state may drop it.
        lay: where its elements were, see `_lie`.
    """

    sketch: _Sketch | None
    held: list[Held]
    views: list[Box | None]
    tensor: weakref.ref[torch.Tensor] | None = None
    lay: _Lay | None = None

    def marked(
        self, number: int, memory: torch.Tensor, first: dict[_Sketch, str], *, unequal: bool
    ) -> Held:
        """Return box `number` with the marks that it has now; `first` knows the memory so far."""
        held = self.held[number]
        tie = _tie(held, memory, (self.sketch, unequal), first)
        if (held.tie, held.unequal) != (tie, unequal):
            # Kept, so that a state that does not change is described by the very same objects.
            held = msgspec.structs.replace(held, tie=tie, unequal=unequal)
            self.held[number] = held
        return held


# Of these exact types planning looks at nothing but what a sketch holds.
_PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})


class Describer:
    """Describes tensors save after save, and plans only those that are new or changed.

    What is kept is structure. Memory is taken from the tensor itself each time, so one whose
    storage was exchanged is never read from where it used to be.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Known] = {}
        self._unequal: dict[str, Collection[str]] = {}
        self._digested: tuple[list[Held], str] = ([], "")

    def describe(
        self,
        tensors: NamedTensors,
        *,
        unequal: Mapping[str, Collection[str]] | None = None,
        stepped: Mapping[str, Collection[str]] | None = None,
    ) -> list[LocalBox]:
        """List the boxes of `tensors` that lie on this rank, in the order of parts and names.

        Args:
            tensors: live tensors by part and name.
            unequal: by part, the names under which ranks may hold different values.
            stepped: by part, the names whose memory only an optimizer's step changes.

        Raises:
            UsageError: a tensor cannot be stored (on the meta device, sparse, of a dtype without a
                place in the format, without memory), or holds pending partial sums.
        """
        varying, waiting = dict(unequal or {}), stepped or {}
        with torch.no_grad():  # `to_local` is a graph operation otherwise, and ten times as slow
            boxes = self._unchanged(tensors, waiting) if varying == self._unequal else None
            if boxes is None:
                self._unequal = varying
                boxes = self._changed(tensors, waiting)
        return boxes

    def _unchanged(
        self, tensors: NamedTensors, stepped: Mapping[str, Collection[str]]
    ) -> list[LocalBox] | None:
        """Return the boxes if each tensor is the very object it was, with its elements in place.

        Then no tie between two of them can be another one either.
        """
        # As many, and below each of them known: so none is gone either.
        if sum(map(len, tensors.values())) != len(self._known):
            return None
        boxes = []
        for part, named in tensors.items():
            waiting = stepped.get(part, ())
            for name, tensor in named.items():
                known = self._known.get((part, name))
                if known is None or known.tensor is None or known.tensor() is not tensor:
                    return None
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if _lie(local) != known.lay:
                    return None
                # Each view costs, more so when it goes: torch lets other threads run meanwhile.
                memory = local.detach() if local.requires_grad else local
                for held, view in zip(known.held, known.views, strict=True):
                    boxes.append(LocalBox(held, _viewed(memory, held, view), name in waiting))
        return boxes

    def _changed(
        self, tensors: NamedTensors, stepped: Mapping[str, Collection[str]]
    ) -> list[LocalBox]:
        """Look at each tensor; plan it where it is not planned yet."""
        # What is gone from the state is forgotten with it.
        before, self._known = self._known, {}
        boxes = []
        for part, named in tensors.items():
            varying, waiting = self._unequal.get(part, ()), stepped.get(part, ())
            # Of one part: the format knows no ties between parts.
            first: dict[_Sketch, str] = {}
            for name, tensor in named.items():
                entry, memories = _look_up(before.get((part, name)), part, name, tensor)
                self._known[part, name] = entry
                for number, memory in enumerate(memories):
                    held = entry.marked(number, memory, first, unequal=name in varying)
                    boxes.append(LocalBox(held, memory, name in waiting))
        return boxes

    def digest(self, held: list[Held]) -> str:
        """Return a digest of `held`; of the very objects of the call before, that one."""
        # Lists look first whether they have the very same objects, and an unchanged state has.
        if not self._digested[1] or self._digested[0] != held:
            self._digested = (held, bytes_digest(msgspec.msgpack.encode(held)))
        return self._digested[1]


def local_boxes(tensors: NamedTensors) -> list[LocalBox]:
    """Return the boxes of `tensors` that lie on this rank, to be loaded into: none has a mark.

    Raises:
        UsageError: see `Describer.describe`.
    """
    boxes = []
    with torch.no_grad():
        for part, named in tensors.items():
            for name, tensor in named.items():
                for held, memory, _ in plan_boxes(part, name, tensor):
                    _check_backed(part, name, memory, have=memory.untyped_storage().nbytes())
                    boxes.append(LocalBox(held, memory))
    return boxes


def _check_storable(part: str, name: str, tensor: torch.Tensor) -> None:
    where = f"tensor {name!r} of part {part!r}"
    if tensor.layout is not torch.strided:
        raise UsageError(f"{where} has layout {tensor.layout}: only dense tensors can be stored")
    if tensor.device.type == "meta":
        raise UsageError(f"{where} is on the meta device, so it has no values to store")
    if isinstance(tensor, DTensor) and any(each.is_partial() for each in tensor.placements):
        raise UsageError(f"{where} holds partial sums: redistribute it before it is saved")
    if tensor.is_quantized or dtype_name(tensor.dtype) not in DTYPES:
        raise UsageError(
            f"{where} has dtype {tensor.dtype}, which the format cannot store: save its "
            "bytes, .view(torch.uint8)"
        )


def _look_up(
    known: _Known | None, part: str, name: str, tensor: torch.Tensor
) -> tuple[_Known, list[torch.Tensor]]:
    """Return what is known of `tensor`, planned if it must be, and the memory of each box."""
    sketch = _sketch(tensor)
    if sketch is not None and known is not None and known.sketch == sketch:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        views = zip(known.held, known.views, strict=True)
        memories = [_viewed(local.detach(), held, view) for held, view in views]
    else:
        planned = plan_boxes(part, check_tensor_name(name), tensor)
        known = _Known(sketch, [held for held, _, _ in planned], [view for _, _, view in planned])
        memories = [memory for _, memory, _ in planned]
    for memory in memories:
        _check_backed(part, name, memory, have=memory.untyped_storage().nbytes())
    # A type of its own may change what nobody sees from here: it is planned each time.
    if memories and sketch is not None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        known.tensor, known.lay = weakref.ref(tensor), _lie(local)
    return known, memories


def _lie(local: torch.Tensor) -> _Lay:
    """Return where the elements of a dense tensor are, and what they are."""
    storage_bytes = local.untyped_storage().nbytes()
    return (local.data_ptr(), storage_bytes, local.shape, local.stride(), local.dtype)


def _sketch(tensor: torch.Tensor) -> _Sketch | None:
    """Return what the planning of `tensor` depends on, None for a type that may know better."""
    if type(tensor) in _PLAIN:
        return (tensor.dtype, tensor.shape, tensor.layout, tensor.device.type)
    if isinstance(tensor, DTensor):
        # Mesh and placements fix the box: a rank never moves within a mesh.
        where = (tensor.device_mesh, tensor.placements, shard_order_of(tensor), joined_of(tensor))
        return (tensor.dtype, tensor.shape, *where)
    return None


_Planned = tuple[Held, torch.Tensor, Box | None]
"""A box, the memory of it, and where that lies in the local tensor; None for all of it."""


def plan_boxes(part: str, name: str, tensor: torch.Tensor) -> list[_Planned]:
    """Return which boxes of one tensor lie on this rank, as DCP says.

    Args:
        part: where the tensor is in the state.
        name: of the tensor within the part.
        tensor: a plain one, or a distributed one.

    Raises:
        UsageError: it cannot be stored.
    """
    _check_storable(part, name, tensor)
    if type(tensor) in _PLAIN:
        # What DCP says of them, at a tenth of the cost: the first save waits for it.
        shape = tuple(tensor.shape)
        whole = Held(part, name, dtype_name(tensor.dtype), shape, (0,) * len(shape), shape)
        return [(whole, tensor.detach() if tensor.requires_grad else tensor, None)]
    if isinstance(tensor, DTensor):
        return _plan_dtensor(part, name, tensor)
    named = {name: tensor}
    boxes: list[_Planned] = []
    # DCP reads `is_coordinator` only for values that are no tensors, of which there are none.
    for item in create_default_local_save_plan(named, is_coordinator=False).items:
        if item.tensor_data is None:  # pragma: no branch - only tensors were given
            continue
        data = item.tensor_data
        held = Held(
            part,
            name,
            dtype_name(tensor.dtype),
            tuple(data.size),
            tuple(data.chunk.offsets),
            tuple(data.chunk.sizes),
        )
        boxes.append((held, _memory(part, named, item.index), None))
    return boxes


def _plan_dtensor(part: str, name: str, tensor: DTensor) -> list[_Planned]:
    where = f"tensor {name!r} of part {part!r}"
    local = tensor.to_local()
    if is_wrapped(tensor):
        raise _no_memory(part, name, local)
    dtype, shape = dtype_name(tensor.dtype), stored_shape(tensor)
    boxes: list[_Planned] = []
    for there, here in boxes_here(tensor, where):
        # Where rows were cut for the layout's sake, the box is that of what they were before.
        there = joined_box(tensor, there)
        held = Held(part, name, dtype, shape, there.offsets, there.sizes)
        view = None if here.sizes == tuple(local.shape) and len(shape) == local.ndim else here
        boxes.append((held, _viewed(local.detach(), held, view), view))
    return boxes


def _viewed(local: torch.Tensor, held: Held, view: Box | None) -> torch.Tensor:
    """Return the memory of a box in the local tensor."""
    if view is None:
        return local
    memory = view_box(local, view, origin=(0,) * local.ndim)
    return memory if memory.ndim == len(held.sizes) else memory.view(held.sizes)


def _memory(part: str, named: Mapping[str, torch.Tensor], index: MetadataIndex) -> torch.Tensor:
    found: Any = find_state_dict_object(dict(named), index)
    # A shard may be a wrapper subclass too, where a quantized tensor was sharded.
    if is_traceable_wrapper_subclass(found) or not isinstance(found, torch.Tensor):
        raise _no_memory(part, index.fqn, found)
    return found.detach()


def _no_memory(part: str, name: str, found: object) -> UsageError:
    return UsageError(
        f"tensor {name!r} of part {part!r}: what lies on this rank is a "
        f"{type(found).__qualname__}, which is no dense tensor and cannot be stored"
    )


def _tie(held: Held, memory: torch.Tensor, like: _Sketch, first: dict[_Sketch, str]) -> str:
    """Return the earlier tensor that is the same memory, laid out alike; empty without one."""
    if like[0] is None or not memory.numel():
        return ""
    # The address says which storage and where in it: storages that are alive do not overlap.
    owner = first.setdefault((memory.data_ptr(), memory.stride(), like), held.name)
    return "" if owner == held.name else owner


def _check_backed(part: str, name: str, memory: torch.Tensor, *, have: int) -> None:
    """Refuse a tensor that reaches beyond its storage of `have` bytes: reading it would crash."""
    if not memory.numel():
        return
    if have < (memory.storage_offset() + reach(memory)) * memory.itemsize:
        raise UsageError(
            f"tensor {name!r} of part {part!r} has no memory: its storage of {have} bytes was "
            "freed or cut short. Give it its values back before it is saved"
        )
