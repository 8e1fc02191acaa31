"""Whether somebody else holds the memory of a tensor that lies in a plain value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Further in nobody puts a state dict.
_DEEPEST = 8


def is_held(tensor: torch.Tensor) -> bool:
    """Tell whether another tensor has the memory of `tensor`, or a module or optimizer may hold it.

    A state dict is made of such tensors: if a load put others into the dict, the model would keep
    its old weights. One that lies in the dict alone can be exchanged there.
    """
    if isinstance(tensor, (nn.Parameter, DTensor)) or tensor.requires_grad:
        return True
    if tensor.is_meta or tensor.layout is not torch.strided:
        return False
    try:
        storage = tensor.untyped_storage()
        count = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001
    except (AttributeError, RuntimeError, NotImplementedError):
        return True  # who cannot tell does not exchange it
    # The tensor itself, `storage` here, and what the tensor is a view of.
    own = 3 if tensor._base is not None else 2  # noqa: SLF001
    return count > own


def is_of_module(value: object) -> bool:
    """Tell whether `value` is what `state_dict` of a module returned: torch marks these."""
    return isinstance(value, Mapping) and hasattr(value, "_metadata")


class Borrowed:
    """The tensors in `value` that are those of modules, of which it holds state dicts.

    Such a dict shows what the module has as long as that keeps its tensors. One that was moved to
    another device since, or gives a buffer a new tensor in its forward pass, goes on without it.
    """

    def __init__(self, value: object) -> None:
        self._found = [
            (each, key, id(tensor))
            for each in _state_dicts(value, 0)
            for key, tensor in each.items()
            if isinstance(tensor, torch.Tensor) and tensor.numel() and is_held(tensor)
        ]

    def stale(self) -> str | None:
        """Return the name of a tensor that only the dict has any more; None if there is none."""
        for each, key, identity in self._found:
            tensor = each.get(key)
            # One that was exchanged in the dict was so on purpose.
            if id(tensor) == identity and isinstance(tensor, torch.Tensor) and not is_held(tensor):
                return str(key)
        return None


def _state_dicts(value: object, depth: int) -> Iterator[Mapping[Any, Any]]:
    if is_of_module(value):
        assert isinstance(value, Mapping)
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and depth < _DEEPEST:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _state_dicts(item, depth + 1)
