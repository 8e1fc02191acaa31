"""Wrapped tensors under torch's own planning, which knows the whole and nothing of what it is.

A plan says of a quantized weight what it says of a plain one: dtype, shape, and which rows are
here. Written are the tensors that it is made of, named as `dist_ckpt.save` names them. Which those
are only the rank knows that has them, so it is part of what it reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.dcp.items import Paths, box_of
from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.foreign.dcp_runs import path_of
from dist_ckpt.foreign.leaves import dotted
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.index import Held
from dist_ckpt.planning.describe import LocalBox, local_boxes
from dist_ckpt.state.layout import is_wrapped, local_of, shard_like
from dist_ckpt.state.rebuilding import difference, how_made
from dist_ckpt.state.spread import pieces, shards_of


@decodable
class Common(msgspec.Struct, frozen=True):
    """A box of an inner tensor that several shards have alike, and the digest of its bytes."""

    name: str
    offsets: tuple[int, ...]
    digest: str


@decodable
class Face(msgspec.Struct, frozen=True):
    """What a rank writes for one item that is several tensors behind one face.

    Attributes:
        fqn: the name of the whole.
        held: the boxes of the inner tensors that the rank writes.
        noted: how the whole is made, see `how_made`.
        common: what other shards have, too.
    """

    fqn: str
    held: list[Held]
    noted: dict[str, Any]
    common: list[Common]


Faces = Mapping[int, Face]
"""By the number of the item, among those of tensors in the plan of one rank."""


@dataclass(frozen=True, slots=True)
class LocalFace:
    """A face with the live memory of its boxes."""

    face: Face
    boxes: list[LocalBox]


def local_face(planner: SavePlanner, item: WriteItem, paths: Paths) -> LocalFace | None:
    """Return what is to be written of `item` if it is several tensors behind one face.

    Args:
        planner: has the live tensors.
        item: what is planned.
        paths: where in the state dict each flattened name lies.

    Raises:
        UsageError: it cannot be taken apart, or the plan is not about all that is here of it.
    """
    fqn = item.index.fqn
    live = getattr(planner, "state_dict", {}).get(fqn)
    if not isinstance(live, torch.Tensor) or not is_wrapped(live):
        return None
    with torch.no_grad():
        # Planners may transform what they give, and what is written is what this one gives.
        value = planner.resolve_data(item)
    if not isinstance(value, torch.Tensor) or not is_wrapped(value):
        return None  # a planner of the user's that stores something else for it
    box = box_of(item)
    if isinstance(value, DTensor) or tuple(value.shape) != box.sizes:
        raise UsageError(
            f"tensor {fqn!r}: a {type(local_of(value)).__qualname__} is written as a whole, and "
            f"the planner plans {list(box.sizes)} of the {list(local_of(live).shape)} on this "
            "rank: plan it as the planner of torch does",
            kind=ErrorKind.UNENCODABLE,
        )
    whole = laid_out(value, live)
    part, name = part_and_name(fqn, paths)
    inner = {f"{name}{suffix}": each for suffix, each in pieces(whole, fqn).items()}
    boxes: list[LocalBox] = []
    common: list[Common] = []
    for each in local_boxes({part: inner}):
        alike = _dims_alike(live, inner[each.held.name])
        if alike:
            digest = _digest(each.memory)
            common.append(Common(each.held.name, each.held.offsets, digest))
        # Every item is in the plan of one rank, so there is one that begins the whole.
        if not any(box.offsets[dim] for dim in alike):
            boxes.append(each)
    return LocalFace(Face(fqn, [each.held for each in boxes], how_made(whole), common), boxes)


def agreed(plans: Sequence[Sequence[WriteItem]], faces: Sequence[Faces]) -> dict[str, Any]:
    """Return what is noted of each wrapped tensor, by flattened name.

    Args:
        plans: by rank, the items of tensors.
        faces: by rank, what it reported.

    Raises:
        IncompatibleError: the shards of one are of different kinds, or differ where the whole has
            one value for all of them.
    """
    noted: dict[str, dict[str, Any]] = {}
    digests: dict[tuple[str, str, tuple[int, ...]], tuple[int, str]] = {}
    for rank, mine in enumerate(faces):
        for face in mine.values():
            # A copy, as the cuts that other ranks know are added to it.
            known = noted.setdefault(face.fqn, dict(face.noted))
            if (problem := difference(known, face.noted)) is not None:
                raise _differ(face.fqn, f"{problem} on rank {rank}")
            # A shard of few rows cannot be asked how it is cut, and another one can.
            known["cuts"] = {**face.noted["cuts"], **known["cuts"]}
            for each in face.common:
                key = (face.fqn, each.name, each.offsets)
                first, digest = digests.setdefault(key, (rank, each.digest))
                if digest != each.digest:
                    raise _differ(
                        face.fqn,
                        f"{each.name!r}, which is one for all of its shards, has other values on "
                        f"rank {rank} than on rank {first}. Quantize the whole and shard that",
                    )
    inside = {name: fqn for mine in faces for face in mine.values() for name, fqn in _inside(face)}
    for rank, (items, mine) in enumerate(zip(plans, faces, strict=True)):
        for number, item in enumerate(items):
            fqn = item.index.fqn
            if fqn in noted and number not in mine:
                raise _differ(fqn, f"it is a plain tensor on rank {rank}")
            if fqn in inside:
                raise UsageError(
                    f"tensor {inside[fqn]!r} is several tensors in one, and what is stored for one "
                    f"of them is called {fqn!r}, as something else in the state dict is: rename "
                    "one of the two"
                )
    return noted


def _inside(face: Face) -> Iterator[tuple[str, str]]:
    """Yield the flattened name of each inner tensor, with that of the whole."""
    for held in face.held:
        name = dotted(path_of(held.part, held.name))
        if name != face.fqn:
            yield name, face.fqn


def _differ(fqn: str, how: str) -> IncompatibleError:
    return IncompatibleError(
        f"tensor {fqn!r} is several tensors in one, and its shards do not belong together: {how}"
    )


def laid_out(value: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return `value`, what is on this rank, as the shard that it is of what `live` is."""
    if not isinstance(live, DTensor):
        return value
    return live if local_of(live) is value else shard_like(live, value)


def _dims_alike(whole: torch.Tensor, inner: torch.Tensor) -> set[int]:
    """Return the dimensions of `whole` that are cut without `inner` being cut by that."""
    if not isinstance(whole, DTensor) or not isinstance(inner, DTensor):
        return set()
    cutting = shards_of(whole)
    pairs = zip(whole.placements, inner.placements, strict=True)
    alike = (here for here, there in pairs if isinstance(there, Replicate))
    # `_StridedShard` is what torch has where FSDP2 cuts what tensor parallelism has cut before.
    return {here.dim for here in alike if isinstance(here, Shard | _StridedShard)} & cutting.keys()


def _digest(memory: torch.Tensor) -> str:
    flat = memory.detach().cpu().contiguous().reshape(-1)
    return bytes_digest(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
