"""A module as a part: parameters and persistent buffers in place, extra state as objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError, describe, is_refusal
from dist_ckpt.state.layout import check_storable, check_tensor, empty_beside, inner_tensors
from dist_ckpt.state.meta import check_knowable, give_memory
from dist_ckpt.state.names import canonical_name, refuse_fsdp1, wrapped_attribute
from dist_ckpt.state.objects import decode, encode, references
from dist_ckpt.state.part import Captured, Stored, Targets


@dataclass(frozen=True, slots=True)
class _Entry:
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


class ModelPart:
    """The state dict of `module` under canonical names.

    Parameters and persistent buffers are loaded in place; DTensors stay DTensors. A tensor that is
    several behind one face (a wrapper subclass, as quantized weights are) is stored as these,
    `name.<attribute>` each. What the module makes up for its state dict (`get_extra_state`, hooks
    that copy) is loaded fresh and given back through `module.load_state_dict`. Tied parameters
    appear under each of their names. What is on the meta device becomes real by a restore;
    parameters stay the same objects.

    Args:
        module: the live module.
        name: of the part, for messages.
        trainable_only: leave out parameters that do not require gradients, and whatever else
            belongs to submodules that own no parameter which does (a frozen, perhaps quantized
            base is loaded from where it came from).
    """

    def __init__(
        self, module: nn.Module, *, name: str = "model", trainable_only: bool = False
    ) -> None:
        self.module = module
        self.name = name
        self._trainable_only = trainable_only
        self._optimizers: list[Optimizer] = []
        # Canonical by raw name, true for a module tree of these types.
        self._canonical: dict[str, str] = {}
        self._types: list[type[nn.Module]] = []
        self._wrapped = False
        refuse_fsdp1(module, name)

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Note that `optimizer` is part of the same state and changes parameters of this one."""
        self._optimizers.append(optimizer)

    def parameter_names(self) -> dict[int, str]:
        """Return the canonical name of every parameter by its `id`; of tied ones the first."""
        # Asking for the state dict first lets FSDP2 put its sharded parameters back in place.
        self.module.state_dict(keep_vars=True)
        names: dict[int, str] = {}
        canonical = self._names()
        for raw_name, parameter in self.module.named_parameters():
            # By identity: an optimizer holds these very objects and knows no names.
            names.setdefault(id(parameter), canonical(raw_name))
        return names

    def capture(self) -> Captured:
        """Return live parameters and buffers, and the extra state encoded."""
        tensors: dict[str, torch.Tensor] = {}
        objects: dict[str, bytes] = {}
        unequal: set[str] = set()
        stepped: set[str] = set()
        entries = self._entries()
        buffers = {id(buffer) for buffer in self.module.buffers()}
        parameters = _parameters(self._optimizers)
        for name, entry in entries.items():
            if isinstance(entry.value, torch.Tensor):
                check_storable(entry.value, self.name, name)
                tensors[name] = entry.value
                if id(entry.owner) in buffers:
                    unequal.add(name)
                elif id(entry.owner) in parameters:
                    stepped.add(name)
        # After all tensors, so that a name made up inside an object gives way to a real one.
        for name, entry in entries.items():
            if not isinstance(entry.value, torch.Tensor):
                objects[name] = encode(
                    entry.value, path=self._path(name), tensors=tensors, prefix=name
                )
        return Captured(tensors, objects, unequal=frozenset(unequal), stepped=frozenset(stepped))

    def targets(self, stored: Stored) -> Targets:
        """Return live tensors for what is live, fresh ones for what the module makes up.

        Raises:
            IncompatibleError: something on the meta device is in no state dict.
        """
        targets = Targets()
        owned: set[str] = set()
        aliases: dict[int, torch.Tensor] = {}
        entries = self._entries()
        check_knowable(self.module, {id(entry.value) for entry in entries.values()}, self.name)
        for name, entry in entries.items():
            is_tensor = isinstance(entry.value, torch.Tensor)
            if name not in (stored.tensors if is_tensor else stored.objects):
                targets.missing.append(name)
            elif not is_tensor:
                owned.update([name, *references(stored.objects[name], path=self._path(name))])
            elif entry.live:
                alias = check_tensor(entry.value, self._path(name), meta=True)
                # One alias for tied names: on the meta device that is all that ties them.
                targets.tensors[name] = aliases.setdefault(id(entry.value), alias)
            else:  # a made-up tensor may have another size each time
                targets.tensors[name] = empty_beside(entry.value, stored.tensors[name])
        for name in sorted(owned & stored.tensors.keys()):
            targets.tensors[name] = empty_beside(torch.empty(0), stored.tensors[name])
        targets.unexpected.extend(sorted(stored.tensors.keys() - targets.tensors.keys()))
        targets.unexpected.extend(sorted(stored.objects.keys() - owned))
        return targets

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the module what it made up itself; its own tensors are filled already."""
        made_up: dict[str, Any] = {}
        memory: dict[int, torch.Tensor] = {}
        entries = self._entries()
        for name, entry in entries.items():
            if isinstance(entry.value, torch.Tensor):
                if not entry.live and name in tensors:
                    made_up[entry.raw_name] = tensors[name]
                elif name in tensors and entry.value.device.type == "meta":
                    memory[id(entry.value)] = tensors[name]
            elif name in stored.objects:
                data = stored.objects[name]
                made_up[entry.raw_name] = decode(data, tensors=tensors, path=self._path(name))
        if memory:
            give_memory(self.module, memory, self.name)
        if made_up:
            self._load(made_up)

    def _load(self, made_up: dict[str, Any]) -> None:
        try:
            # Not strict: parameters are filled already and are left out here.
            unexpected = self.module.load_state_dict(made_up, strict=False).unexpected_keys
        except CheckpointError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(
                f"{self.name}: load_state_dict refused {sorted(made_up)}: {describe(error)}"
            ) from error
        if unexpected:
            raise IncompatibleError(
                f"{self.name}: load_state_dict does not know {sorted(unexpected)}, which "
                "state_dict returned: make the two of the module agree"
            )

    def _entries(self) -> dict[str, _Entry]:
        # With keep_vars the module's own tensors are in it themselves, so a copy that a hook
        # made can be told from them: loading into a copy would be lost.
        state = self.module.state_dict(keep_vars=True)
        live = {id(tensor) for tensor in self.module.parameters()}
        live.update(id(tensor) for tensor in self.module.buffers())
        canonical = self._names()
        trained = self._trained_modules() if self._trainable_only else None
        entries: dict[str, _Entry] = {}
        for raw_name, value in state.items():
            if trained is not None and not _is_trained(raw_name, value, trained):
                continue
            name = canonical(raw_name)
            is_live = id(value) in live
            inner = inner_tensors(value, name) if is_live else {name: value}
            for one, tensor in inner.items():
                if one in entries:
                    raise UsageError(
                        f"{self.name}: {entries[one].raw_name!r} and {raw_name!r} are both called "
                        f"{one!r} without wrappers: rename one of the modules"
                    )
                entries[one] = _Entry(raw_name, tensor, is_live, value)
        return entries

    def _names(self) -> Callable[[str], str]:
        """Return what gives the canonical name for a raw one."""
        # A name depends on which modules are wrappers, and on nothing else.
        modules = list(self.module.modules())
        types = [type(module) for module in modules]
        if types != self._types:
            self._canonical, self._types = {}, types
            one_of_each = dict(zip(types, modules, strict=True)).values()
            self._wrapped = any(wrapped_attribute(module) for module in one_of_each)
        if not self._wrapped:
            return str

        def canonical(raw_name: str) -> str:
            name = self._canonical.get(raw_name)
            if name is None:
                name = self._canonical[raw_name] = canonical_name(self.module, raw_name)
            return name

        return canonical

    def _trained_modules(self) -> set[str]:
        """Return the names of the submodules that own a parameter which requires a gradient."""
        return {
            name
            for name, module in self.module.named_modules()
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        }

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}"


def _parameters(optimizers: Iterable[Optimizer]) -> set[int]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def _is_trained(raw_name: str, value: object, trained: set[str]) -> bool:
    # By the flag and not by the gradient, which is None before the first backward.
    if isinstance(value, nn.Parameter):
        return value.requires_grad
    return raw_name.rpartition(".")[0] in trained
