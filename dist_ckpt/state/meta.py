"""Modules on the meta device: what can be known of them, and memory for their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dist_ckpt.errors import IncompatibleError, describe

_SHOWN = 5


def check_knowable(module: nn.Module, stored: Collection[int], part: str) -> None:
    """Check that a load can give a value to everything in `module` that has none.

    Args:
        module: the whole module.
        stored: the ids of the tensors in its state dict.
        part: what it is called, for the message.

    Raises:
        IncompatibleError: a tensor on the meta device is in no state dict. Left there it would
            fail at the first use, and memory without a value would be taken for one.
    """
    lost = [
        name
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.device.type == "meta" and id(tensor) not in stored
    ]
    if lost:
        rest = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise IncompatibleError(
            f"{part}: {', '.join(lost[:_SHOWN])}{rest} on the meta device: no checkpoint has a "
            "value for what is not in the state dict (such as buffers with persistent=False). "
            "Compute these on a real device before the load"
        )


def give_memory(module: nn.Module, memory: Mapping[int, torch.Tensor], part: str) -> None:
    """Put tensors with values in the place of those on the meta device.

    Parameters stay the objects that they are, so that an optimizer built on them holds the real
    ones; tied ones stay tied.

    Args:
        module: the whole module.
        memory: by the id of the tensor on the meta device.
        part: what the module is called, for the message.

    Raises:
        IncompatibleError: torch cannot exchange a tensor that something else holds on to.
    """

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        real = memory.get(id(tensor))
        # A tied parameter is met again after its exchange: it is real by then.
        if real is None or tensor.device.type != "meta":
            return tensor
        return real

    try:
        with _exchanging(module):
            # `Module._apply`, on which `to` and `to_empty` stand: wrappers such as FSDP2 hook into
            # it to learn that their parameters have moved.
            module._apply(fill)  # type: ignore[no-untyped-call]  # noqa: SLF001
    except RuntimeError as error:
        raise IncompatibleError(
            f"{part}: a parameter on the meta device cannot be made real in place "
            f"({describe(error)}): load before anything else refers to the parameters, or call "
            "to_empty(device=...) on the module first"
        ) from error


@contextmanager
def _exchanging(module: nn.Module) -> Iterator[None]:
    """Let `Module._apply` exchange tensors behind their objects, not make new parameters."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    # The exchange goes for class and attributes, too, by which programs mark parameters.
    marked = [
        (parameter, type(parameter), dict(vars(parameter))) for parameter in module.parameters()
    ]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
        for parameter, cls, attributes in marked:
            if type(parameter) is not cls:
                parameter.__class__ = cls
            for key, value in attributes.items():
                vars(parameter).setdefault(key, value)
