"""The copy of a state dict for a save in the background, wrapped tensors included.

Of what is several tensors behind one face torch's own staging makes a plain tensor, or fails: it
asks the class for operations that few of them have. Here the tensors that it is made of are copied,
and the whole is built of the copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_ckpt.state.rebuilding import remade
from dist_ckpt.state.registry import is_namedtuple
from dist_ckpt.state.wrapped import is_wrapped, leaves_of, local_of, shard_like


class _Place:
    """Stands for a wrapped tensor while all else is copied.

    Args:
        tensor: that.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        return self  # to be found again in the copy


def copied(
    state: dict[str, Any], copy_others: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `copy_others` makes of `state`, and copies of the wrapped tensors in it.

    Args:
        state: the state dict.
        copy_others: copies everything else.
    """
    places: dict[int, _Place] = {}

    def take(leaf: object) -> object:
        if not is_wrapped(leaf):
            return leaf
        assert isinstance(leaf, torch.Tensor)
        return places.setdefault(id(leaf), _Place(leaf))

    taken = _replaced(state, take)
    if not places:
        return copy_others(state)
    # Once for each, so that one under two names stays one.
    copies = {id(place): _copy(place.tensor) for place in places.values()}
    result = _replaced(
        copy_others(taken), lambda leaf: copies[id(leaf)] if isinstance(leaf, _Place) else leaf
    )
    assert isinstance(result, dict)
    return result


def _replaced(value: Any, leaf: Callable[[object], object]) -> Any:
    """Return the nested `value` with other leaves."""
    if isinstance(value, dict):
        again = copy.copy(value)  # of its class, with the attributes that it has
        for key, each in value.items():
            again[key] = _replaced(each, leaf)
        return again
    if isinstance(value, Mapping):
        return {key: _replaced(each, leaf) for key, each in value.items()}
    if is_namedtuple(type(value)):
        return value._make(_replaced(each, leaf) for each in value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, leaf) for each in value)
    return leaf(value)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a wrapped tensor: of what is on this rank, be it nothing."""
    local = local_of(tensor)
    with torch.no_grad():
        inner = {
            suffix: _copy(leaf) if is_wrapped(leaf) else _to_cpu(leaf)
            for suffix, leaf in leaves_of(local)
        }
        made = remade(local, inner)
        return shard_like(tensor, made) if isinstance(tensor, DTensor) else made


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    # Laid out alike, as its class may rely on that.
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())
