"""Tensors as the state knows them: dtype names, what can be stored, and fresh targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.wrapped import alias_of, hides_values, is_wrapped, stored_shape, unfilled_like

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
    if hides_values(tensor):
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
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            key = _meta_key(tensor)
            if key not in made:
                own = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else place
                made[key] = unfilled_like(tensor, device=torch.device(own))
            tensor = made[key]
        real[name] = tensor
    return real


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
