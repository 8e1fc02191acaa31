"""Several modules as one part: a list or a dict, saved as a module that held them would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, TypeGuard

from torch import nn

from dist_ckpt.errors import UsageError
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.part import Captured, Stored, Targets

Modules: TypeAlias = Mapping[str, nn.Module] | Sequence[nn.Module]
"""By key, or by place."""


def holds_modules(value: object) -> TypeGuard[Modules]:
    """Tell whether `value` is a list or dict of modules alone, or of one at least."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    return (
        isinstance(items, list | tuple)
        and bool(items)
        and all(isinstance(item, nn.Module) for item in items)
    )


class ModulesPart(ModelPart):
    """Modules that are one part; their names begin with the key of each, or its place.

    That is what a `ModuleDict` or a `ModuleList` of them would be called, and so either can be
    loaded from the other's checkpoint.

    Args:
        modules: the list or dict; who exchanges one in it later is told so.
        name: of the part, for messages.
        trainable_only: as for `ModelPart`.

    Raises:
        UsageError: a key that no submodule can be called by.
    """

    def __init__(self, modules: Modules, *, name: str, trainable_only: bool = False) -> None:
        self._modules = modules
        self._given = dict(_items(modules))
        super().__init__(_joined(self._given, name), name=name, trainable_only=trainable_only)

    def capture(self) -> Captured:
        """Return what the modules have now; see `ModelPart.capture`.

        Raises:
            UsageError: the list or dict has other modules than it had.
        """
        self._check_current()
        return super().capture()

    def targets(self, stored: Stored) -> Targets:
        """Return as `ModelPart.targets`.

        Raises:
            UsageError: the list or dict has other modules than it had.
        """
        self._check_current()
        return super().targets(stored)

    def _check_current(self) -> None:
        now = dict(_items(self._modules))
        keys = {**self._given, **now}
        changed = [key for key in keys if now.get(key) is not self._given.get(key)]
        if changed:
            raise UsageError(
                f"part {self.name!r} has other modules than it had, under {', '.join(changed)}: "
                "build a new state"
            )


def _items(modules: Modules) -> Iterator[tuple[str, nn.Module]]:
    pairs = modules.items() if isinstance(modules, Mapping) else enumerate(modules)
    for key, module in pairs:
        yield str(key), module


def _joined(modules: Mapping[str, nn.Module], part: str) -> nn.Module:
    whole = nn.Module()
    for key, module in modules.items():
        try:
            whole.add_module(key, module)
        except KeyError as error:  # with a dot, empty, or what a module has itself
            raise UsageError(
                f"part {part!r}: a module cannot be called {key!r} in a dict of modules "
                f"({error.args[0]}): give it another key, or a part of its own"
            ) from error
    return whole
