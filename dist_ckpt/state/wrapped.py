"""Tensors that are several behind one face: the plain tensors that are stored for them.

A wrapper subclass (quantized weights, 8-bit moments) says by `__tensor_flatten__` of which tensors
it is made. These are stored, each under the name of the whole and `.` and its attribute, and what
is loaded into them is what the whole holds. No list of classes is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dist_ckpt.format.boxes import Box

Shape = tuple[int, ...]

_PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
_PIECE = "_dist_ckpt_piece"


@dataclass(frozen=True, slots=True)
class Piece:
    """What an inner tensor of a sharded one is, beside a DTensor.

    Attributes:
        placements: those of the DTensor that it is inside of.
        joined: the first of two dimensions that are one in the inner tensor and in what is stored:
            rows of the whole, and elements for each of them.
        stacked: whether its first dimension counts the shards, as the inner tensor has none for it.
    """

    placements: tuple[Placement, ...]
    joined: int | None = None
    stacked: bool = False


def piece_of(tensor: object) -> Piece | None:
    """Return what is known of `tensor` if it is the inner tensor of a sharded one."""
    return getattr(tensor, _PIECE, None) if isinstance(tensor, DTensor) else None


def as_piece(tensor: torch.Tensor, of: torch.Tensor | Piece | None) -> torch.Tensor:
    """Return `tensor`, an alias of another one or made like it, as the piece that that is."""
    piece = of if isinstance(of, Piece) else piece_of(of)
    if piece is not None:
        setattr(tensor, _PIECE, piece)
    return tensor


def shard_order_of(tensor: DTensor) -> object:
    """Return in which order the dimensions of the mesh cut those of `tensor`, if torch says so."""
    return getattr(tensor._spec, "shard_order", None)  # noqa: SLF001 - there is no public way


def alias_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` without gradient: the same memory, laid out alike."""
    return _alike(tensor.detach(), tensor)


def unfilled_like(
    tensor: torch.Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Return memory without values, laid out as `tensor`."""
    made = torch.empty_like(tensor.detach(), dtype=dtype, device=device)
    return _alike(made, tensor)


def shard_like(like: DTensor, local: torch.Tensor) -> DTensor:
    """Return `local` as what this rank has of a DTensor that is laid out as `like`.

    Nothing is asked of its class (`DTensor.from_local` wants a view), and it is not moved.
    """
    kind: Any = DTensor
    made: DTensor = kind(local, like._spec, requires_grad=False)  # noqa: SLF001
    return made


def _alike(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `made`, an alias or a copy of `like`, with what operations of torch leave behind."""
    if (
        isinstance(made, DTensor)
        and isinstance(like, DTensor)
        and shard_order_of(made) != shard_order_of(like)
    ):
        # The very elements of `like` are on this rank, in whatever order the mesh cut them.
        spec = replace(like._spec, tensor_meta=made._spec.tensor_meta)  # noqa: SLF001
        kind: Any = DTensor
        made = kind(made._local_tensor, spec, requires_grad=False)  # noqa: SLF001
    return as_piece(made, like)


def joined_of(tensor: torch.Tensor) -> int | None:
    """Return the first of the two dimensions of `tensor` that are stored as one."""
    piece = piece_of(tensor)
    return None if piece is None else piece.joined


def stored_shape(tensor: torch.Tensor) -> Shape:
    """Return the shape that `tensor` is stored in: its own, but for some inner tensors."""
    at = joined_of(tensor)
    return tuple(tensor.shape) if at is None else _joined(tuple(tensor.shape), at)


def joined_box(tensor: torch.Tensor, box: Box) -> Box:
    """Return `box`, whole rows of `tensor`, in elements of what is stored of it."""
    at = joined_of(tensor)
    if at is None:
        return box
    offset = box.offsets[at] * int(tensor.shape[at + 1])
    offsets = (*box.offsets[:at], offset, *box.offsets[at + 2 :])
    return Box(offsets, _joined(box.sizes, at))


def _joined(sizes: Shape, at: int) -> Shape:
    return (*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :])


def inner_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the inner tensor on this rank that `tensor` was made of."""
    if not isinstance(tensor, DTensor):
        return tensor
    local, piece = tensor._local_tensor, piece_of(tensor)  # noqa: SLF001 - a graph operation else
    if piece is None:
        return local
    if piece.stacked:
        return local.squeeze(0)
    return local if piece.joined is None else local.flatten(piece.joined, piece.joined + 1)


def local_of(value: torch.Tensor) -> torch.Tensor:
    """Return what of `value` is on this rank."""
    return value._local_tensor if isinstance(value, DTensor) else value  # noqa: SLF001


def hides_values(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is a face without memory whose class does not say what is behind it."""
    if type(tensor) in _PLAIN or tensor.is_meta or is_wrapped(tensor):
        return False
    local = local_of(tensor)
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - its class would answer
        return local.numel() > 0 and local.data_ptr() == 0


def is_wrapped(value: object) -> bool:
    """Tell whether `value`, or what a DTensor has on this rank, is several tensors in one."""
    if type(value) in _PLAIN or not isinstance(value, torch.Tensor):
        return False
    local = local_of(value)
    several: bool = is_traceable_wrapper_subclass(local)
    # A ragged one has no size to cut or to rebuild it by: it is refused as no dense tensor.
    return several and not isinstance(local, DTensor) and not local.is_nested


# The classes that the state of this program has shown, by their names: no others are ever built.
_shown: dict[str, type] = {}


def learn(cls: type) -> None:
    """Note a class of wrapped tensors that the state of this program has."""
    _shown[label_of(cls)] = cls


def shown(label: str) -> type | None:
    """Return the class of that name, if it was noted."""
    return _shown.get(label)


def label_of(kind: type) -> str:
    """Return what a class is called in a checkpoint."""
    return f"{kind.__module__}.{kind.__qualname__}"


def show_classes(kind: type) -> None:
    """Let wrapper subclasses of the package that has `kind`, as far as loaded, be built.

    A fresh optimizer has no state that would show what that will be made of.
    """
    home = kind.__module__.partition(".")[0]
    level: list[Any] = [] if home == "torch" else [torch.Tensor]
    while level:
        level = [below for cls in level for below in type.__subclasses__(cls)]
        for cls in level:
            both = hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__")
            if both and cls.__module__.partition(".")[0] == home:
                learn(cls)


def attributes_of(local: torch.Tensor) -> dict[str, tuple[str, torch.Tensor]]:
    """Return the inner tensors of a wrapper by attribute, with what comes behind its name."""
    learn(type(local))
    names, context = local.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: getattr(local, name) for name in names}
    bare = _bare(local, inner, context)
    # What stands beside a value that is whole without it is marked, so that a plain tensor, which
    # has no place for it, can be loaded from that value alone.
    mark = "." if bare is None else ".@"
    return {
        name: ("" if name == bare else f"{mark}{name}", tensor) for name, tensor in inner.items()
    }


def is_beside(name: str) -> bool:
    """Tell whether what is stored as `name` stands beside a value that is whole without it."""
    return name.rpartition(".")[2].startswith("@")


def leaves_of(local: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that `local` is made of, at any depth, with what comes behind its name."""
    for suffix, tensor in attributes_of(local).values():
        if is_wrapped(tensor) and not isinstance(tensor, DTensor):
            for more, leaf in leaves_of(tensor):
                yield suffix + more, leaf
        else:
            yield suffix, tensor


_bares: dict[object, bool] = {}


def _bare(local: torch.Tensor, inner: Mapping[str, torch.Tensor], context: object) -> str | None:
    """Return the attribute that is the value itself: in shape, in dtype, and element by element.

    So it is where a wrapper only changes what is computed with a weight of high precision.
    """
    like = [
        name
        for name, tensor in inner.items()
        if tensor.shape == local.shape and tensor.dtype == local.dtype
    ]
    # All others belong to it if they are small: a second tensor of that size is half of a value.
    small = all(inner[name].numel() <= 1 for name in inner if name not in like)
    if len(like) != 1 or not small or not local.dtype.is_floating_point:
        return None
    (name,) = like
    key = (type(local), local.dtype, local.ndim, tuple(inner), repr(context))
    if key not in _bares:
        _bares[key] = _is_bare(type(local), name, inner, context)
    return name if _bares[key] else None


def _is_bare(cls: Any, name: str, inner: Mapping[str, torch.Tensor], context: object) -> bool:
    """Ask a small tensor of the class: is it its inner tensor, for whoever computes with it?"""
    like = inner[name]
    shape = torch.Size([2] * like.ndim)
    values = torch.arange(1.0, 1.0 + shape.numel()).reshape(shape).to(like.dtype)
    others = {each: torch.ones_like(tensor, device="cpu") * 3 for each, tensor in inner.items()}
    try:
        with torch.no_grad():
            asked = cls.__tensor_unflatten__(
                {**others, name: values.clone()}, context, shape, values.stride()
            )
            told = asked + torch.zeros_like(values)
            return type(told) is torch.Tensor and torch.equal(told, values)
    except Exception:
        return False  # whoever does not answer is not asked for more
