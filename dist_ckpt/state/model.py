"""A module, or several, as a part: tensors in place, extra state as objects, names as they fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeAlias, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    UsageError,
    describe,
    is_refusal,
)
from dist_ckpt.state.adapters import fit_adapter
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import (
    check_storable,
    check_tensor,
    dtype_of,
    empty_beside,
    is_beside,
    is_wrapped,
    memory_of,
    stored_shape,
    unfilled_like,
)
from dist_ckpt.state.module_state import (
    ModuleEntry,
    ParameterNames,
    Say,
    Trained,
    accepts,
    extra_state_names,
    module_entries,
    names_of_parameters,
    note_of_taken,
    partners,
    raw_state,
    refuse_fsdp1,
    some_of,
    tell_after,
    tell_part,
    told_entries,
)
from dist_ckpt.state.part import Captured, Stored, Targets, TensorSpec, is_dry
from dist_ckpt.state.resizing import live_copy
from dist_ckpt.state.shown import Quantized, give_quantized, is_untold, quantized_by

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
        # Before the module is told: what torch copies into a tensor on the meta device is lost.
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
        left = [name for name in found.targets.missing if stored.selects(name)]
        if given or found.migrated or say.foreign:
            own = told_entries(say, self.name)
            state = _state_dict(own, given, found)
            for name in own.keys() & left if not say.whole else ():
                state.pop(own[name].raw_name, None)
            if found.migrated or say.foreign or say.after:
                self._tell(say, state, lenient=bool(found.targets.missing))
            else:  # what the module made up is all that it has to see
                raw = {own[name].raw_name if name in own else name for name in given}
                self._tell(say, {key: state[key] for key in raw}, lenient=True)
        else:
            tell_after(say, left, found.targets.unexpected)

    def _tell(self, say: Say, state: Mapping[str, Any], *, lenient: bool) -> None:
        try:
            unexpected = tell_part(say, state, lenient=lenient)
        except CheckpointError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(
                f"{self.name}: load_state_dict refused {some_of(state)}: {describe(error)}"
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
    # The flag is one of the whole process, and the program may have set it for itself.
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


# Gradients that no step has used yet: no checkpoint has them, so a resumed run would lose them.


_Used = tuple[int, int, int] | None


class _Watch:
    """Which gradients of one optimizer have been used, told by those of its first parameter.

    Most programs keep gradients until the next backward pass, so that there are some says nothing:
    what counts is whether they were written since the last step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._used = _use_of(_first(optimizer))
        # Not to be compiled into a compiled step, which would be compiled anew for each gradient.
        optimizer.register_step_post_hook(torch.compiler.disable(self.stepped))  # type: ignore[no-untyped-call]

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


# One hook for an optimizer, of however many states it is a part, and it dies with it.
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
    # Accumulated in place a gradient stays the same object, and its version counts on.
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


# Which stored name goes where in a module: decided before anything of it is changed.


@dataclass
class ModuleFit:
    """How the entries of a module and a checkpoint fit.

    Attributes:
        say: who in the module has a say.
        targets: where the stored bytes go.
        partner: the stored name of each entry that has one.
        handed: the entries that are not filled in place but handed to the module, and the stored
            names that it takes without having an entry for them.
        renamed: entries that the module fills from stored names of another kind.
        migrated: whether it makes its own entries of what is stored.
        quantized: entries that a parameter shows of its quantization, with that parameter.
    """

    say: Say
    targets: Targets = field(default_factory=Targets)
    partner: dict[str, str] = field(default_factory=dict)
    handed: list[str] = field(default_factory=list)
    renamed: set[str] = field(default_factory=set)
    migrated: bool = False
    quantized: dict[str, Quantized] = field(default_factory=dict)


def fit_module(
    module: nn.Module,
    entries: Mapping[str, ModuleEntry],
    stored: Stored,
    *,
    names: Callable[[str], str],
    part: str,
    required: Collection[str],
    passed_over: Collection[str],
) -> ModuleFit:
    """Find where each stored tensor and object goes.

    Args:
        module: the live module.
        entries: those of its state dict.
        stored: what there is.
        names: gives the canonical name for a raw one.
        part: what the module is called, for messages.
        required: the entries that are missing where they are not stored; of the others what is
            stored is loaded, except frozen parameters.
        passed_over: stored names that may be left.

    Raises:
        IntegrityError: a stored object is malformed.
        IncompatibleError: a stored object cannot be made in this program.
    """
    say = Say(module)
    wanted = {
        name: entry
        for name, entry in entries.items()
        if name in required or not isinstance(entry.owner, nn.Parameter)
    }
    fitting = _Fitting(module, say, wanted, stored, part)
    # In this order: a hook is offered only what has no place under its own name.
    fitting.place(required)
    fitting.take_extra_states(set(extra_state_names(module, names)))
    found = fitting.found
    others = fitting.unclaimed()
    # Not otherwise: to ask takes a load of a shadow of the whole module.
    if say.any and (found.targets.missing or others or fitting.of_another_shape):
        fitting.migrate(others, left_out=entries.keys() - required)
    found.targets.unexpected.extend(name for name in fitting.unclaimed() if name not in passed_over)
    return found


class _Fitting:
    def __init__(
        self,
        module: nn.Module,
        say: Say,
        wanted: Mapping[str, ModuleEntry],
        stored: Stored,
        part: str,
    ) -> None:
        self._module = module
        self._again: Mapping[str, object] | None = None
        self.found = ModuleFit(say)
        self.of_another_shape: set[str] = set()
        self._wanted = wanted
        self._stored = stored
        self._part = part
        self._inside: set[str] = set()  # tensors of stored objects

    def place(self, required: Collection[str]) -> None:
        """Give each wanted entry its stored partner."""
        found, stored = self.found, self._stored
        names = stored.tensors.keys() | stored.objects.keys()
        if stored.is_adapter:
            adapter = fit_adapter(self._wanted, names, self._part)
            both, required = adapter.found, adapter.own & set(required)
        else:
            both = partners(self._wanted, names, is_foreign=stored.is_foreign)
        aliases: dict[int, torch.Tensor] = {}
        seen = found.say.seen()
        for name, entry in self._wanted.items():
            partner = both.get(name)
            inside = partner is not None and partner in stored.objects and entry.live
            if partner is not None and inside and self._is_kept_inside(partner, entry.value):
                found.partner[name] = partner
                found.handed.append(name)
                continue
            if partner is None or (entry.live and partner not in stored.tensors):
                if name in required:
                    found.targets.missing.append(name)
                continue
            found.partner[name] = partner
            if not entry.live:
                self._take_shown(name, partner, entry)
                continue
            alias = check_tensor(entry.value, f"{self._part}.{name}", meta=True)
            # One alias for tied names: on the meta device that is all that ties them.
            target = aliases.setdefault(id(entry.value), alias)
            rule = None
            if stored_shape(alias) != stored.tensors[partner].shape:
                # Of what is several tensors behind one face, the rows of one are no rows.
                rule = stored.resize(partner) if _is_whole(entry) else None
                if rule is None:
                    self.of_another_shape.add(name)
                else:
                    found.targets.resized[partner] = rule
            if (
                name not in self.of_another_shape
                and id(entry.owner) in seen
                and not alias.is_meta
                and entry.value is entry.owner
            ):
                # Fresh, as torch has it: the program's own method may look at both.
                target = unfilled_like(alias) if rule is None else live_copy(alias)
                found.handed.append(name)
            found.targets.tensors[partner] = target
        self._leave_tied()

    def _take_shown(self, name: str, partner: str, entry: ModuleEntry) -> None:
        """Place what the module shows without having it as a parameter or buffer."""
        found, raw_name, live = self.found, entry.raw_name, entry.value
        if raw_name.endswith("_extra_state") or not is_untold(self._module, raw_name):
            self._hand(name, partner, live)
            return
        quantized = quantized_by(self._module, raw_name)
        if quantized is not None and partner in self._stored.tensors:
            found.quantized[name] = quantized
            # Of its own size: it becomes part of what is built of it.
            spec = self._stored.tensors[partner]
            found.targets.tensors[partner] = empty_beside(live, spec, device=live.device)
            return
        # Asked once more: what is another object now was made up, and filling it would be lost.
        if self._again is None:
            self._again = raw_state(self._module)
        if isinstance(live, torch.Tensor) and live is self._again.get(raw_name):
            found.targets.tensors[partner] = check_tensor(live, f"{self._part}.{name}")
            return
        raise IncompatibleError(
            f"{self._part}: state_dict returns {raw_name!r}, which is no parameter, buffer or "
            "extra state, and load_state_dict takes no such key: make the two agree, or leave it "
            f"out with skip=[{self._part + '/' + name!r}]",
            kind=ErrorKind.STATE_MISMATCH,
        )

    def _is_kept_inside(self, partner: str, live: torch.Tensor) -> bool:
        """Tell whether a stored value is a tensor like `live`, kept inside of a Python value.

        So a planner stores the state dict of a module that takes nothing apart.
        """
        data, path = self._stored.objects[partner], f"{self._part}.{partner}"
        if references(data, path=path) or isinstance(live, DTensor) or live.is_meta:
            return False
        value = decode(data, tensors={}, path=path)
        return (
            isinstance(value, torch.Tensor)
            and value.shape == live.shape
            and value.dtype == live.dtype
        )

    def _leave_tied(self) -> None:
        """Do not miss a name whose memory is filled under another one."""
        found = self.found
        if found.targets.missing:
            live = {name: entry for name, entry in self._wanted.items() if entry.live}
            filled = {memory_of(live[name].value) for name in found.partner if name in live}
            found.targets.missing[:] = [
                name
                for name in found.targets.missing
                if name not in live or memory_of(live[name].value) not in filled
            ]

    def take_extra_states(self, known: Collection[str]) -> None:
        """Take what a module is ready to take although it has none now."""
        for name in self.unclaimed():
            if name in known:
                self.found.partner[name] = name
                self._hand(name, name, None)

    def unclaimed(self) -> list[str]:
        """Return the stored names that have no place yet."""
        claimed = {*self.found.partner.values(), *self._inside}
        stored = self._stored
        # What makes a weight of high precision quicker to use is nothing to who has the weight.
        tensors = sorted(
            name
            for name in stored.tensors.keys() - claimed
            if not (is_beside(name) and name.rpartition(".")[0] in claimed)
        )
        return tensors + sorted(stored.objects.keys() - claimed)

    def migrate(self, others: Collection[str], *, left_out: Collection[str]) -> None:
        """Let the module make what is missing of the `others`, if it says that it can."""
        found, stored = self.found, self._stored
        if not all(name in stored.tensors for name in others):
            return
        missing = set(found.targets.missing)
        entries = {**self._wanted, **told_entries(found.say, self._part)}
        state = {
            entries[name].raw_name: _meta(stored.tensors[partner])
            for name, partner in found.partner.items()
            if name in self._wanted and self._wanted[name].live
        }
        state.update({name: _meta(stored.tensors[name]) for name in others})
        absent = {entries[n].raw_name for n in missing if not stored.selects(n)}
        absent |= set(left_out)
        if not accepts(found.say, state, absent=absent):
            return
        found.migrated = True
        for name in (*self.of_another_shape, *others):
            partner = found.partner.setdefault(name, name)
            found.targets.tensors[partner] = self._beside(stored.tensors[partner], name, missing)
            found.handed.append(name)
        # It fills these itself, out of what has other names.
        found.renamed |= {name for name in missing if name not in absent}
        note = note_of_taken(self._part, found.renamed, others)
        left = [name for name in missing if not stored.selects(name)]
        found.targets = replace(found.targets, missing=left, note=note)

    def _hand(self, name: str, partner: str, live: object) -> None:
        """Let the stored `partner` be read, and handed to the module."""
        found, stored = self.found, self._stored
        found.handed.append(name)
        if partner in stored.tensors:  # a made-up tensor may have another size each time
            like = live if isinstance(live, torch.Tensor) else torch.empty(0)
            found.targets.tensors[partner] = empty_beside(like, stored.tensors[partner])
            return
        data, path = stored.objects[partner], f"{self._part}.{name}"
        inside = references(data, path=path)
        if not inside:  # so that nothing is changed when it cannot be made
            decode(data, tensors={}, path=path)
        for each in inside:
            if each in stored.tensors:
                self._inside.add(each)
                found.targets.tensors[each] = empty_beside(torch.empty(0), stored.tensors[each])

    def _beside(self, spec: TensorSpec, name: str, missing: Collection[str]) -> torch.Tensor:
        """Return memory for what the module will copy: laid out as what it is likely to become."""
        live = {n: e.value for n, e in self._wanted.items() if e.live}
        alike = [n for n in missing if n in live and tuple(live[n].shape) == spec.shape]
        near = max(alike or live, key=lambda each: _common(each, name), default=None)
        if near is None:
            return empty_beside(torch.empty(0), spec)
        tensor = live[near].detach()
        if alike and not tensor.is_meta:
            # In its dtype, so that a cast is one that was asked for.
            return torch.empty_like(tensor)
        if isinstance(tensor, DTensor) or not tensor.is_meta:
            return empty_beside(tensor, spec)
        return empty_beside(torch.empty(0), spec)


def _is_whole(entry: ModuleEntry) -> bool:
    return entry.value is entry.owner or not is_wrapped(entry.owner)


def _common(first: str, second: str) -> int:
    """Return how many components two names begin with together."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _meta(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta")
