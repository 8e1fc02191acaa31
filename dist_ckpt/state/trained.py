"""Which entries of a module training changes, when most of it is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dist_ckpt.state.module_state import Entry

_Mark = tuple[int, int]


class Trained:
    """Tells what of `module` is trained: the parameters that require gradients, and more.

    Buffers beside such a parameter are, and so are statistics: those of batch normalisation, which
    a forward pass in training mode changes also where all parameters are frozen, and any buffer
    that was written or exchanged since this object was made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._marks: WeakKeyDictionary[nn.Module, dict[str, _Mark]] = WeakKeyDictionary()
        for each in module.modules():
            self._marks[each] = {name: _mark(b) for name, b in each.named_buffers(recurse=False)}

    def names(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return the names of those `entries` that are trained."""
        changed = {id(buffer) for buffer in self._changed()}
        others = {name for name, entry in entries.items() if id(entry.owner) in changed}
        return self.by_gradient(entries) | others

    def by_gradient(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return the names of those that gradients train, and of what is beside them."""
        # By the flag and not by the gradient, which is None before the first backward. The module
        # that owns an entry is told by the name that the state dict has for it.
        beside = {
            entry.raw_name.rpartition(".")[0]
            for entry in entries.values()
            if isinstance(entry.owner, nn.Parameter) and entry.owner.requires_grad
        }
        return {
            name
            for name, entry in entries.items()
            if (
                entry.owner.requires_grad
                if isinstance(entry.owner, nn.Parameter)
                else entry.raw_name.rpartition(".")[0] in beside
            )
        }

    def _changed(self) -> Iterator[torch.Tensor]:
        for each in self._module.modules():
            marks = self._marks.get(each, {})
            # torch's own name for all normalisations with running statistics.
            counts = isinstance(each, nn.modules.batchnorm._NormBase)  # noqa: SLF001
            for name, buffer in each.named_buffers(recurse=False):
                if counts or marks.get(name) != _mark(buffer):
                    yield buffer


def _mark(buffer: torch.Tensor) -> _Mark:
    # torch counts the writes to a tensor, except where it was made without that.
    return id(buffer), -1 if buffer.is_inference() else buffer._version  # noqa: SLF001
