"""A module as a part: parameters and persistent buffers in place, extra state as objects."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError, describe, is_refusal
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import check_storable
from dist_ckpt.state.module_state import (
    ModuleEntry,
    ModuleFit,
    ParameterNames,
    fit_module,
    module_entries,
    names_of_parameters,
)
from dist_ckpt.state.names import refuse_fsdp1
from dist_ckpt.state.part import Captured, Stored, Targets, is_dry
from dist_ckpt.state.shown import give_quantized
from dist_ckpt.state.told import Say, tell_after, tell_part

_log = logging.getLogger("dist_ckpt")


class ModelPart:
    """The state dict of `module` under canonical names.

    Parameters and persistent buffers are loaded in place; DTensors stay DTensors. A tensor that is
    several behind one face (a wrapper subclass, as quantized weights are) is stored as these,
    `name.<attribute>` each. What the module makes up for its state dict (`get_extra_state`, hooks
    that copy) is loaded fresh and given back through `module.load_state_dict`; so is everything
    that hooks or methods of the program's own are to see of a load. Tied parameters appear under
    each of their names. What is on the meta device becomes real by a restore; parameters stay the
    same objects.

    Args:
        module: the live module.
        name: of the part, for messages.
        trainable_only: leave out parameters that do not require gradients, and whatever else
            belongs to submodules that own no parameter which does (a frozen, perhaps quantized
            base is loaded from where it came from), except what training changes all the same:
            see `dist_ckpt.state.model`.
        passed_over: names of what is no weight: of such an entry it does not matter if it is stored
            and not in this module, or the other way round.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "model",
        trainable_only: bool = False,
        passed_over: Collection[str] = (),
    ) -> None:
        self.module = module
        self.name = name
        self._optimizers: list[Optimizer] = []
        self._naming = ParameterNames(module)
        self._trained = Trained(module) if trainable_only else None
        self._passed_over = frozenset(passed_over)
        self._fitted: tuple[Stored, ModuleFit] | None = None
        self._said: set[str] = set()
        refuse_fsdp1(module, name)

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Note that `optimizer` is part of the same state and changes parameters of this one."""
        self._optimizers.append(optimizer)
        watch(optimizer)

    def parameter_names(self) -> dict[int, str]:
        """Return the canonical name of every parameter by its `id`; of tied ones the first."""
        # By identity: an optimizer holds these very objects and knows no names.
        return names_of_parameters(self.module, self._naming.current())

    def capture(self) -> Captured:
        """Return live parameters and buffers, and the extra state encoded."""
        tensors: dict[str, torch.Tensor] = {}
        objects: dict[str, bytes] = {}
        unequal: set[str] = set()
        stepped: set[str] = set()
        entries = self._entries()
        if self._trained is not None:
            kept = self._trained.names(entries)
            entries = {name: entry for name, entry in entries.items() if name in kept}
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
        if not (tensors or objects):
            self._say_once("it has no trained or other state: nothing is stored for it")
        elif any(has_pending(optimizer) for optimizer in self._optimizers):
            self._say_once(
                "it has gradients that no optimizer step has used yet, and no checkpoint has "
                "gradients: a resumed run goes on without them. Save after optimizer.step()"
            )
        return Captured(tensors, objects, unequal=frozenset(unequal), stepped=frozenset(stepped))

    def targets(self, stored: Stored) -> Targets:
        """Return live tensors for what is live, fresh ones for what the module makes up.

        Raises:
            IncompatibleError: something on the meta device is in no state dict, or a stored value
                cannot be made in this program.
        """
        entries = self._entries()
        check_knowable(self.module, {id(entry.value) for entry in entries.values()}, self.name)
        return self._fit(stored, entries).targets

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the module what it made up itself; its own tensors are filled already."""
        entries = self._entries()
        found = self._fit(stored, entries)
        memory: dict[int, torch.Tensor] = {}
        for name, entry in entries.items():
            partner = found.partner.get(name, name)
            if partner in tensors and entry.live and entry.value.device.type == "meta":
                memory[id(entry.value)] = tensors[partner]
        if memory:
            give_memory(self.module, memory, self.name)
        self._give(found, stored, tensors)
        if found.quantized:  # entered only where there are some
            names = {name: entries[name].raw_name for name in found.quantized}
            partners = {name: found.partner[name] for name in names}
            read = {name: tensors[each] for name, each in partners.items() if each in tensors}
            give_quantized(found.quantized, names, read, self.name)

    def _give(self, found: ModuleFit, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hand over what is not filled in place, and tell the module that it was loaded."""
        given: dict[str, Any] = {}
        for name in found.handed:
            partner = found.partner.get(name, name)
            if partner in stored.objects:
                data = stored.objects[partner]
                given[name] = decode(data, tensors=tensors, path=self._path(name))
            elif partner in tensors:
                given[name] = tensors[partner]
        say = found.say
        if given or found.migrated or say.foreign:
            # As the one that is told calls them, which may be what a wrapper holds.
            own = module_entries(say.root, ParameterNames(say.root).current(), self.name)
            state = _state_dict(own, given, found)
            if found.migrated or say.foreign or say.after:
                self._tell(say, state, lenient=bool(found.targets.missing))
            else:  # what the module made up is all that it has to see
                raw = {own[name].raw_name if name in own else name for name in given}
                self._tell(say, {key: state[key] for key in raw}, lenient=True)
        else:
            tell_after(say)

    def _tell(self, say: Say, state: Mapping[str, Any], *, lenient: bool) -> None:
        try:
            unexpected = tell_part(say, state, lenient=lenient)
        except CheckpointError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(
                f"{self.name}: load_state_dict refused {_listed(state)}: {describe(error)}"
            ) from error
        if unexpected:
            raise IncompatibleError(
                f"{self.name}: load_state_dict does not know {sorted(unexpected)}, which "
                "state_dict returned: make the two of the module agree"
            )

    def _fit(self, stored: Stored, entries: Mapping[str, ModuleEntry]) -> ModuleFit:
        # Kept from `targets` to `restore`, so that hooks are not asked more often than needed. A
        # module may change between two loads, so for no other one.
        if self._fitted is None or self._fitted[0] is not stored:
            # Statistics of a frozen base are loaded if they are stored: nobody has to have them.
            trained = self._trained
            required = entries.keys() if trained is None else trained.by_gradient(entries)
            found = fit_module(
                self.module,
                entries,
                stored,
                names=self._naming.current(),
                part=self.name,
                required=required - self._passed_over,
                passed_over=self._passed_over,
            )
            self._fitted = (stored, found)
        return self._fitted[1]

    def _entries(self) -> dict[str, ModuleEntry]:
        return module_entries(self.module, self._naming.current(), self.name)

    def _say_once(self, what: str) -> None:
        if what not in self._said and not is_dry():
            self._said.add(what)
            _log.warning("part %r: %s", self.name, what)

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}"


def _parameters(optimizers: Iterable[Optimizer]) -> set[int]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def _state_dict(
    own: Mapping[str, ModuleEntry], given: Mapping[str, Any], found: ModuleFit
) -> dict[str, Any]:
    """Return what torch would be given: what was loaded, and live tensors for what is in place."""
    # A live tensor that is copied to itself is no work, and a strict load finds it there.
    state = {
        entry.raw_name: entry.owner
        for name, entry in own.items()
        if entry.live and name not in found.renamed
    }
    if found.say.whole:
        # Its own method may rely on all that its state dict has, and these are to stay as they are.
        state.update({e.raw_name: e.value for name, e in own.items() if not e.live})
    state.update({own[name].raw_name if name in own else name: v for name, v in given.items()})
    return state


def _listed(state: Mapping[str, Any]) -> str:
    names = sorted(state)
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# Modules on the meta device: what can be known of them, and memory for their tensors.


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


# Which entries of a module training changes, when most of it is frozen.


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

    def names(self, entries: Mapping[str, ModuleEntry]) -> set[str]:
        """Return the names of those `entries` that are trained."""
        changed = {id(buffer) for buffer in self._changed()}
        others = {name for name, entry in entries.items() if id(entry.owner) in changed}
        return self.by_gradient(entries) | others

    def by_gradient(self, entries: Mapping[str, ModuleEntry]) -> set[str]:
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


# Gradients that no step has used yet: no checkpoint has them, so a resumed run would lose them.


_Used = tuple[int, int, int] | None


class _Watch:
    """Which gradients of one optimizer have been used, told by those of its first parameter.

    Most programs keep gradients until the next backward pass, so that there are some says nothing:
    what counts is whether they were written since the last step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._used = _use_of(_first(optimizer))
        optimizer.register_step_post_hook(self.stepped)

    def stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that what there is has been used; one look at one tensor, in every step."""
        self._used = _use_of(_first(optimizer))

    def has_pending(self, optimizer: Optimizer) -> bool:
        """Tell whether gradients were written since the last step."""
        parameter = _first(optimizer)
        if parameter is None or _use_of(parameter) == self._used:
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


def _use_of(parameter: torch.Tensor | None) -> _Used:
    if parameter is None or parameter.grad is None:
        return None
    gradient = parameter.grad
    return id(parameter), id(gradient), gradient._version  # noqa: SLF001


# Several modules as one part: a list or a dict, saved as a module that held them would be.


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
