"""Gradients that no step has used yet: no checkpoint has them, so a resumed run would lose them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_Mark = tuple[int, int, int] | None


class _Watch:
    """Which gradients of one optimizer have been used, told by those of its first parameter.

    Most programs keep gradients until the next backward pass, so that there are some says nothing:
    what counts is whether they were written since the last step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._used = _mark(_first(optimizer))
        optimizer.register_step_post_hook(self.stepped)

    def stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that what there is has been used; one look at one tensor, in every step."""
        self._used = _mark(_first(optimizer))

    def has_pending(self, optimizer: Optimizer) -> bool:
        """Tell whether gradients were written since the last step."""
        parameter = _first(optimizer)
        if parameter is None or _mark(parameter) == self._used:
            return False
        gradient = parameter.grad
        assert gradient is not None  # `_first` looked
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        # `zero_grad(set_to_none=False)` writes, too.
        return bool(local.any())


_watches: WeakKeyDictionary[Optimizer, _Watch] = WeakKeyDictionary()


def watch(optimizer: Optimizer) -> None:
    """Watch the steps of `optimizer` from now on, if it is one of torch's kind."""
    if isinstance(optimizer, Optimizer) and optimizer not in _watches:
        _watches[optimizer] = _Watch(optimizer)


def has_pending(optimizer: Optimizer) -> bool:
    """Tell whether `optimizer`, if it is watched, has gradients that no step has used yet."""
    if not isinstance(optimizer, Optimizer) or optimizer not in _watches:
        return False
    with torch.no_grad():
        return _watches[optimizer].has_pending(optimizer)


def _first(optimizer: Optimizer) -> torch.Tensor | None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                found: torch.Tensor = parameter
                return found
    return None


def _mark(parameter: torch.Tensor | None) -> _Mark:
    if parameter is None or parameter.grad is None:
        return None
    gradient = parameter.grad
    return id(parameter), id(gradient), gradient._version  # noqa: SLF001
