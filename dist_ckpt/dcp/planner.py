"""What one rank holds, described by DCP's local planning.

`create_default_local_save_plan` knows every tensor type that torch can shard (plain tensors,
DTensor, ShardedTensor): its write items say which box of which global tensor lies on this rank. The
same description serves saving (what there is to write) and loading (where bytes belong).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.shard import DTYPES

NamedTensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Live tensors by part and name."""


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A box of a tensor that a rank holds, as it travels to the coordinator.

    `unequal`: other ranks may hold other values under this name, and the lowest rank's count (the
    buffers of a DDP model, which its next forward broadcasts from there).
    """

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    unequal: bool = False

    @property
    def box(self) -> Box:
        """The box, in elements of the global tensor."""
        return Box(self.offsets, self.sizes)

    @property
    def tensor(self) -> TensorEntry:
        """The global tensor that the box is of."""
        return TensorEntry(self.part, self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class LocalBox:
    """A box that this rank holds, with the live memory behind it."""

    held: Held
    memory: torch.Tensor


def describe(
    tensors: NamedTensors, *, unequal: Mapping[str, Collection[str]] | None = None
) -> list[LocalBox]:
    """List the boxes of `tensors` that lie on this rank, in the order of parts and names.

    Args:
        tensors: live tensors by part and name.
        unequal: by part, the names under which ranks may hold different values.

    Raises:
        UsageError: a tensor cannot be stored (on the meta device, sparse, of a dtype without a
            place in the format), or holds pending partial sums.
    """
    boxes: list[LocalBox] = []
    for part, named in tensors.items():
        for name, tensor in named.items():
            _check_storable(part, name, tensor)
        # DCP reads `is_coordinator` only for values that are no tensors, of which there are none.
        plan = create_default_local_save_plan(dict(named), is_coordinator=False)
        for item in plan.items:
            if item.tensor_data is None:  # pragma: no branch - only tensors were given
                continue
            data = item.tensor_data
            held = Held(
                part,
                item.index.fqn,
                dtype_name(named[item.index.fqn].dtype),
                tuple(data.size),
                tuple(data.chunk.offsets),
                tuple(data.chunk.sizes),
                item.index.fqn in (unequal or {}).get(part, ()),
            )
            boxes.append(LocalBox(held, _memory(named, item.index)))
    return boxes


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as the format writes it, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_same(entries: Sequence[tuple[int, TensorEntry]]) -> None:
    """Check that every rank describes one global tensor alike.

    Raises:
        IncompatibleError: dtype or shape differ; the message names the tensor and two ranks.
    """
    first_rank, first = entries[0]
    for rank, entry in entries[1:]:
        if (entry.dtype, entry.shape) != (first.dtype, first.shape):
            raise IncompatibleError(
                f"tensor {entry.name!r} of part {entry.part!r} is {first.dtype}"
                f"{list(first.shape)} on rank {first_rank} and {entry.dtype}{list(entry.shape)} on "
                f"rank {rank}: one name must mean one tensor (PerRank(...) keeps values apart)",
                kind=ErrorKind.REPLICAS_DIFFER,
            )


def _check_storable(part: str, name: str, tensor: torch.Tensor) -> None:
    where = f"tensor {name!r} of part {part!r}"
    if tensor.layout is not torch.strided:
        raise UsageError(f"{where} has layout {tensor.layout}: only dense tensors can be stored")
    if tensor.device.type == "meta":
        raise UsageError(f"{where} is on the meta device, so it has no values to store")
    if isinstance(tensor, DTensor) and any(each.is_partial() for each in tensor.placements):
        raise UsageError(f"{where} holds partial sums: redistribute it before it is saved")
    if tensor.is_quantized or dtype_name(tensor.dtype) not in DTYPES:
        raise UsageError(f"{where} has dtype {tensor.dtype}, which the format cannot store")


def _memory(named: Mapping[str, torch.Tensor], index: MetadataIndex) -> torch.Tensor:
    found = find_state_dict_object(dict(named), index)
    if not isinstance(found, torch.Tensor):  # DCP's annotation is Any
        raise UsageError(f"tensor {index.fqn!r} has no local memory")
    return found.detach()
