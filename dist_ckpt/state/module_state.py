"""What the state dict of a module is made of: which of it is the module's own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError
from dist_ckpt.state.names import canonical_name, wrapped_attribute
from dist_ckpt.state.spread import inner_tensors
from dist_ckpt.state.wrapped import is_wrapped


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One entry of a state dict, or one inner tensor of a wrapper subclass in it.

    Attributes:
        raw_name: what the module calls it.
        value: the tensor, or what else the module keeps.
        live: whether it is the module's own, and not made up for the state dict.
        owner: the parameter or buffer of the module that it is, or is inside of.
    """

    raw_name: str
    value: Any
    live: bool
    owner: Any


def raw_state(module: nn.Module) -> Mapping[str, Any]:
    """Return the state dict of `module` with its own tensors, not copies without gradient."""
    try:
        # The module's own tensors are in it themselves, so a copy that a hook made can be told from
        # them: loading into a copy would be lost. FSDP2 puts its sharded parameters in place first.
        state: Mapping[str, Any] = module.state_dict(keep_vars=True)
    except TypeError:
        # An engine may hide the state dict of what it wraps behind one without arguments.
        state = module.state_dict()
    return state


@dataclass
class Owners:
    """The parameters and persistent buffers of a module, found by what a state dict shows."""

    module: nn.Module
    by_id: dict[int, torch.Tensor] = field(init=False)
    by_memory: dict[object, torch.Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """List them."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        self.by_id = {id(tensor): tensor for tensor in tensors}

    def of(self, value: object) -> torch.Tensor | None:
        """Return the tensor of the module that `value` is, or shares all its memory with."""
        owner = self.by_id.get(id(value))
        if owner is None and isinstance(value, torch.Tensor):
            if self.by_memory is None:
                pairs = ((_memory(tensor), tensor) for tensor in self.by_id.values())
                self.by_memory = {key: tensor for key, tensor in pairs if key is not None}
            key = _memory(value)
            owner = None if key is None else self.by_memory.get(key)
        return owner


def _memory(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common only if they are the same elements; else None."""
    if isinstance(tensor, DTensor):
        return (tuple(tensor.shape), tensor.placements, _memory(tensor.to_local()))
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return None
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # a lazy tensor, or one behind which are several
        return None
    return (place, tuple(tensor.shape), tensor.stride(), tensor.dtype) if place else None


class ParameterNames:
    """Canonical names of the entries of one module tree; kept until its types change."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._canonical: dict[str, str] = {}
        self._types: list[type[nn.Module]] = []
        self._wrapped = False
        self._base = module

    def current(self) -> Callable[[str], str]:
        """Return what gives the canonical name for a raw one."""
        # A name depends on which modules are wrappers, and on nothing else.
        modules = list(self._module.modules())
        types = [type(module) for module in modules]
        if types != self._types:
            self._canonical, self._types = {}, types
            one_of_each = dict(zip(types, modules, strict=True)).values()
            self._wrapped = any(wrapped_attribute(module) for module in one_of_each)
            # Without known wrappers names are what the state dict says, wherever they begin.
            self._base = _base(self._module) if self._wrapped else self._module
        return self._name if self._wrapped else str

    def _name(self, raw_name: str) -> str:
        name = self._canonical.get(raw_name)
        if name is None:
            name = self._canonical[raw_name] = canonical_name(self._base, raw_name)
        return name


def _base(module: nn.Module) -> nn.Module:
    """Return the module in which the names of the state dict of `module` begin.

    That is another one where a wrapper hides its own name there.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners = Owners(module)
    for raw_name, value in raw_state(module).items():
        full = names.get(id(owners.of(value)), raw_name)
        if full != raw_name:
            prefix = full.removesuffix(f".{raw_name}")
            return module if prefix == full else module.get_submodule(prefix)
    return module


def module_entries(
    module: nn.Module, names: Callable[[str], str], part: str
) -> dict[str, ModuleEntry]:
    """Return the entries of the state dict of `module` by canonical name.

    Args:
        module: the module.
        names: gives the canonical name for a raw one.
        part: what the module is called, for messages.

    Raises:
        UsageError: two entries have one name.
    """
    owners = Owners(module)
    entries: dict[str, ModuleEntry] = {}
    for raw_name, value in raw_state(module).items():
        name = names(raw_name)
        # What modules make up by the book is never memory of theirs, and is not looked for.
        owner = None if raw_name.endswith("_extra_state") else owners.of(value)
        several = owner is not None and is_wrapped(value)
        inner = inner_tensors(value, name) if several else {name: value}
        for one, tensor in inner.items():
            if one in entries:
                raise UsageError(
                    f"{part}: {entries[one].raw_name!r} and {raw_name!r} are both called "
                    f"{one!r} without wrappers: rename one of the modules"
                )
            live = owner is not None
            entries[one] = ModuleEntry(raw_name, tensor, live, owner if live else value)
    return entries


def names_of_parameters(module: nn.Module, names: Callable[[str], str]) -> dict[int, str]:
    """Return the canonical name of every parameter by its `id`; of tied ones the first.

    That is what the state dict calls it: a wrapper may hide its own name there and show it in
    `named_parameters`, and an optimizer's state has to be found under the name of the parameter.
    """
    owners = Owners(module)
    found: dict[int, str] = {}
    for raw_name, value in raw_state(module).items():
        owner = owners.of(value)
        if isinstance(owner, nn.Parameter):
            found.setdefault(id(owner), names(raw_name))
    prefix = None
    left = []
    for raw_name, parameter in module.named_parameters():
        if id(parameter) not in found:
            left.append((names(raw_name), parameter))
        elif prefix is None and names(raw_name).endswith(found[id(parameter)]):
            prefix = names(raw_name).removesuffix(found[id(parameter)])
    # What the state dict leaves out is called as if it were there.
    for name, parameter in left:
        found[id(parameter)] = name.removeprefix(prefix or "")
    return found


def extra_state_names(module: nn.Module, names: Callable[[str], str]) -> Iterator[str]:
    """Yield the names under which modules take extra state, whether they have some now or not."""
    for prefix, each in module.named_modules():
        if type(each).set_extra_state is not nn.Module.set_extra_state:
            yield names(f"{prefix}._extra_state" if prefix else "_extra_state")
