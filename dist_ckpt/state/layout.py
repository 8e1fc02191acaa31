"""Tensors as the state knows them: plain ones, and those that are several behind one face.

A wrapper subclass (quantized weights, 8-bit moments) says by `__tensor_flatten__` of which tensors
it is made. These are stored, each under the name of the whole and `.` and its attribute, and what
is loaded into them is what the whole holds. No list of classes is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.index import Box
from dist_ckpt.state.part import TensorSpec

# str(torch.float) is "torch.float32": aliases fall together, so the table is one to one.
_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as checkpoints have it: `float32`, `bfloat16`, ..."""
    # Looked up: torch makes the string anew each time, and a load asks thousands of times.
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that `dtype_name` named.

    Raises:
        IncompatibleError: this torch has no such dtype.
    """
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise IncompatibleError(
            f"torch {torch.__version__} has no dtype {name!r}: load with a torch that has it"
        )
    return dtype


# What a dense tensor of these exact types can be: nothing about them is out of the ordinary.
_PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})


def check_tensor(tensor: torch.Tensor, path: str, *, meta: bool = False) -> torch.Tensor:
    """Return `tensor` without gradient, an alias of the same memory, if it can be stored.

    Args:
        tensor: a live tensor.
        path: what it is called in the state, for messages.
        meta: whether one on the meta device will do, because it only has to take values.

    Raises:
        UsageError: it has no data yet, or is not a dense plain tensor or DTensor; names `path`.
    """
    check_storable(tensor, path, meta=meta)
    # In-place writes to a leaf that requires grad would be refused.
    return alias_of(tensor)


def check_storable(tensor: torch.Tensor, *path: str, meta: bool = False) -> None:
    """Check that `tensor` can be stored.

    Args:
        tensor: any tensor.
        path: what it is called in the state, joined by dots where it is needed: hardly ever.
        meta: whether one on the meta device will do.

    Raises:
        UsageError: it has no data yet, or is not a dense plain tensor or DTensor; names the path.
    """
    if isinstance(tensor, ShardedTensor):  # before any attribute, of which it has hardly one
        raise UsageError(
            f"cannot store {'.'.join(path)}, a ShardedTensor: give a DTensor in its place "
            "(DTensor.from_local of its local shard), or save the state dict that it is in by "
            "torch.distributed.checkpoint with dist_ckpt.dcp.Writer",
            kind=ErrorKind.UNENCODABLE,
        )
    dense = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if type(tensor) in _PLAIN and dense and not tensor.is_meta:
        return  # nearly all there are: what follows costs as much as describing them
    where = ".".join(path)
    if is_lazy(tensor) or (tensor.is_meta and not meta):
        raise UsageError(
            f"{where} has no data (a meta or lazy tensor): initialise the module first, "
            "for instance with to_empty(device=...) or one forward pass"
        )
    # Such a subclass is several tensors behind one face; its own bytes are not its value.
    if is_wrapped(tensor) or not dense:
        raise UsageError(
            f"cannot store {where}: {_kind(tensor)} is neither a dense tensor nor a DTensor; keep "
            "what it is made of as dense tensors in the state",
            kind=ErrorKind.UNENCODABLE,
        )
    if _hides_values(tensor):
        raise UsageError(
            f"cannot store {where}: a {type(tensor).__qualname__} keeps its values in other "
            "tensors and has no __tensor_flatten__ that says in which; keep these as dense tensors "
            "in the state",
            kind=ErrorKind.UNENCODABLE,
        )


def _kind(tensor: torch.Tensor) -> str:
    """Return in words what makes `tensor` no dense one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return f"a quantized tensor ({dtype_name(tensor.dtype)})"
    return f"a {type(tensor).__qualname__} of layout {tensor.layout}"


def empty_beside(
    like: torch.Tensor, spec: TensorSpec, *, device: torch.device | None = None
) -> torch.Tensor:
    """Return an unfilled tensor of `spec` that can be used in arithmetic with `like`.

    One of the same global shape is laid out as `like` is. Of another shape it is a plain tensor
    on `device`, by default that of `like`. Beside a DTensor a non-scalar is a DTensor, because
    torch refuses to mix the two kinds: sharded along dimensions that it shares with `like`.
    """
    dtype = dtype_of(spec.dtype)
    if device is None and stored_shape(like) == spec.shape:
        return unfilled_like(like, dtype=dtype)
    if device is None and isinstance(like, DTensor) and spec.shape:
        placements = [_shared(placement, like, spec) for placement in like.placements]
        return empty(spec.shape, dtype=dtype, device_mesh=like.device_mesh, placements=placements)
    return torch.empty(spec.shape, dtype=dtype, device=device or like.device)


def address(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the elements of `tensor` on this rank lie, and how many they are."""
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.numel()


def memory_of(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common only if a load that fills one fills the other."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)  # until it has memory, all that ties it is that it is the same one
    try:
        place, elements = address(tensor)
    except RuntimeError:  # behind one face are several
        return id(tensor)
    return (place, elements, tuple(tensor.shape), tensor.dtype) if place else id(tensor)


def memory_order(tensor: torch.Tensor) -> list[int] | None:
    """Return the dimensions of `tensor` from the outermost in memory to the innermost.

    None where that is their own order, and where there are gaps between elements: no order of the
    dimensions gives those back.
    """
    if tensor.is_contiguous():
        return None
    # By hand, for a DTensor of which each operation is an operation of the graph.
    strides, sizes = tensor.stride(), tensor.shape
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return None
        expected *= sizes[dim]
    return order


def in_order(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return `tensor`, or unfilled memory of its kind whose dimensions lie in another order.

    Args:
        tensor: an unfilled tensor.
        order: see `memory_order`; None for that of the dimensions.
    """
    if (order is None and tensor.is_contiguous()) or order == memory_order(tensor):
        return tensor
    dims = list(range(tensor.ndim)) if order is None else list(order)
    if not isinstance(tensor, DTensor):
        return torch.empty_permuted(tensor.shape, dims, dtype=tensor.dtype, device=tensor.device)
    local = tensor.to_local()
    return DTensor.from_local(
        torch.empty_permuted(local.shape, dims, dtype=local.dtype, device=local.device),
        tensor.device_mesh,
        tensor.placements,
        shape=tensor.shape,
        stride=torch.empty_permuted(tensor.shape, dims, device="meta").stride(),
    )


def materialise(
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | None,
    made: dict[object, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return `tensors` with unfilled memory in the place of what is on the meta device.

    Args:
        tensors: those of one part, by name.
        device: where to; None for the device of the mesh where the part has DTensors, and for the
            CPU where it has none. A DTensor always lies where its mesh does.
        made: what was made so far for other parts of the state, which this adds to: tensors that
            are one on the meta device get one memory, under two names or in two parts.
    """
    made = {} if made is None else made
    kinds = [t.device_mesh.device_type for t in tensors.values() if isinstance(t, DTensor)]
    place = device or torch.device(kinds[0] if kinds else "cpu")
    real: dict[str, torch.Tensor] = {}
    if device is not None and any(tensor.device.type == "meta" for tensor in tensors.values()):
        _check_device(device)
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            key = _meta_key(tensor)
            if key not in made:
                own = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else place
                made[key] = unfilled_like(tensor, device=torch.device(own))
            tensor = made[key]
        real[name] = tensor
    return real


def _check_device(device: torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(f"device='{device}' has no memory here ({why}): give another") from error


def _meta_key(tensor: torch.Tensor) -> object:
    """Return what tells a tensor on the meta device from those that are not the very same."""
    # Aliases of one tensor are objects of their own: what they have in common is the storage, of
    # which here too there is one for each tensor, though it has no address.
    placed: object = None
    if isinstance(tensor, DTensor):
        placed = tensor.device_mesh, tensor.placements, tensor.shape
        with torch.no_grad():
            tensor = tensor.to_local()
    storage = StorageWeakRef(tensor.untyped_storage()).cdata  # type: ignore[no-untyped-call]
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, placed


def _shared(placement: Placement, like: DTensor, spec: TensorSpec) -> Placement:
    # Exactly Shard: a strided one orders its pieces by the other mesh dimensions of `like`.
    if type(placement) is Shard:
        dim = placement.dim
        if dim < len(spec.shape) and spec.shape[dim] == like.shape[dim]:
            return placement
    return Replicate()


# Tensors that are several behind one face: the plain tensors that are stored for them.


Shape = tuple[int, ...]

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


def note_written(tensor: torch.Tensor) -> None:
    """Note that `tensor` is written to by other means than torch's, as torch does for its own.

    Torch counts the writes: a backward pass that needs the values from before is an error then,
    and no wrong gradient, and who looks whether a tensor has changed is told so. Aliases by
    `detach` are counted together; a DTensor, of which a graph holds the whole, and what it has on
    this rank are not.
    """
    if not tensor.is_inference():  # these have no count
        increment_version(tensor)


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


def _hides_values(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is a face without memory whose class does not say what is behind it."""
    if type(tensor) in _PLAIN or tensor.is_meta or is_wrapped(tensor):
        return False
    local = local_of(tensor)
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - its class would answer
        return local.numel() > 0 and local.data_ptr() == 0


def is_apart(shape: Sequence[int], strides: Sequence[int], item: int = 1) -> bool:
    """Tell whether each step leads past all that the smaller ones reach: then none is one twice.

    Args:
        shape: of a tensor or an array.
        strides: its own, of which the sign does not matter.
        item: what an element takes, in what the strides count.
    """
    end = item
    for stride, size in sorted(zip(map(abs, strides), shape, strict=True)):
        if size > 1:
            if stride < end:
                return False
            end += (size - 1) * stride
    return True


def is_wrapped(value: object) -> bool:
    """Tell whether `value`, or what a DTensor has on this rank, is several tensors in one."""
    if type(value) in _PLAIN or not isinstance(value, torch.Tensor):
        return False
    local = local_of(value)
    several: bool = is_traceable_wrapper_subclass(local)
    # A ragged one has no size to cut or to rebuild it by: it is refused as no dense tensor.
    return several and not isinstance(local, DTensor) and not local.is_nested


known_classes: dict[str, type] = {}
"""The classes that the state of this program has shown, by name: no others are ever built."""


def learn(cls: type) -> None:
    """Note a class of wrapped tensors that the state of this program has."""
    known_classes[label_of(cls)] = cls


def shown(label: str) -> type | None:
    """Return the class of that name, if it was noted."""
    return known_classes.get(label)


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
