"""How a DTensor is laid out that a part held when it was saved and does not hold yet.

What a program fills as it goes (a moving average, a cache) is empty when a fresh one loads. A
plain tensor in that place would be the whole of it on every rank, and torch mixes it with none that
is sharded. So an encoding says which of its tensors were DTensors, and how they lay; where they are
to lie now is asked of the live ones: of the parameter that is called so, or of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.decoding import Layout
from dist_ckpt.state.layout import dtype_of, empty_beside
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.objects import fillable
from dist_ckpt.state.part import Part, TensorSpec
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.values import ValuePart
from dist_ckpt.state.wrapped import is_wrapped


class LiveLayouts:
    """What the live tensors of a state tell about how others are laid out.

    Args:
        parts: the state.
        world_size: how many ranks there are.
    """

    def __init__(self, parts: Mapping[str, Part], *, world_size: int) -> None:
        self._parts = parts
        self._world_size = world_size
        self._live: dict[str, DTensor] | None = None

    def empty(self, name: str, spec: TensorSpec, layout: Layout) -> torch.Tensor:
        """Return an unfilled tensor for what was a DTensor and has no live counterpart.

        Args:
            name: as stored.
            spec: as stored.
            layout: how it lay.

        Raises:
            IncompatibleError: how it is to lie is not known.
        """
        live = self._dtensors()
        if not live and (self._world_size == 1 or self._has_model()):
            return empty_beside(torch.empty(0), spec)  # nothing is sharded in this program
        like = _called(name, spec, live)
        like = _alone(spec, live) if like is None else like
        if like is not None:
            return empty_beside(like, spec)
        placed = _placed(layout, live, spec)
        if placed is None:
            raise IncompatibleError(
                f"{name!r} was a DTensor when it was saved, and this state has nothing there now: "
                "how it is to lie on these ranks is not known. Fill it before the load as a run "
                "does when it begins (one update of a moving average), or give the module whose "
                "parameters it is of in the same state"
            )
        return placed

    def _dtensors(self) -> dict[str, DTensor]:
        if self._live is None:
            self._live = {
                name: tensor
                for part in self._parts.values()
                for name, tensor in _tensors(part)
                if isinstance(tensor, DTensor) and not is_wrapped(tensor)
            }
        return self._live

    def _has_model(self) -> bool:
        return any(isinstance(part, ModelPart) for part in self._parts.values())


def _tensors(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, ModelPart):
        named = part.parameter_names()
        yield from ((named[id(p)], p) for p in part.module.parameters() if id(p) in named)
        yield from part.module.named_buffers()
    elif isinstance(part, TensorsPart):
        yield from part.tensors.items()
    elif type(part) is ValuePart and not part.per_rank:
        for name, tensor in fillable(part.value, path=part.name, prefix="").items():
            yield name.lstrip("."), tensor


def _called(name: str, spec: TensorSpec, live: Mapping[str, DTensor]) -> DTensor | None:
    """Return the live tensor whose name `name` ends with; of several the longest."""
    found = [
        other
        for other, tensor in live.items()
        if name.endswith(f".{other}") and tuple(tensor.shape) == spec.shape
    ]
    return live[max(found, key=len)] if found else None


def _alone(spec: TensorSpec, live: Mapping[str, DTensor]) -> DTensor | None:
    """Return a live tensor of that shape, if all of them are laid out alike."""
    alike = [tensor for tensor in live.values() if tuple(tensor.shape) == spec.shape]
    places = {(tensor.device_mesh, tensor.placements) for tensor in alike}
    return alike[0] if len(places) == 1 else None


def _placed(layout: Layout, live: Mapping[str, DTensor], spec: TensorSpec) -> torch.Tensor | None:
    """Return a tensor that lies as it lay, if there is one mesh of that form."""
    dims = [dim for _, dim in layout if dim is not None]
    meshes = {
        tensor.device_mesh
        for tensor in live.values()
        if (tensor.device_mesh.mesh_dim_names or (None,) * tensor.device_mesh.ndim)
        == tuple(name for name, _ in layout)
    }
    if not layout or len(meshes) != 1 or not all(0 <= dim < len(spec.shape) for dim in dims):
        return None
    placements: list[Placement] = [Replicate() if d is None else Shard(d) for _, d in layout]
    (mesh,) = meshes
    return empty(spec.shape, dtype=dtype_of(spec.dtype), device_mesh=mesh, placements=placements)
