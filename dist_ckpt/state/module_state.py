"""What the state dict of a module is made of, and which stored name goes where in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.state.adapters import fit_adapter
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.layout import (
    check_tensor,
    dtype_of,
    empty_beside,
    is_beside,
    is_wrapped,
    memory_of,
    stored_shape,
    unfilled_like,
)
from dist_ckpt.state.names import canonical_name, partners, wrapped_attribute
from dist_ckpt.state.part import Stored, Targets, TensorSpec
from dist_ckpt.state.resizing import live_copy
from dist_ckpt.state.shown import Quantized, is_untold, quantized_by
from dist_ckpt.state.spread import inner_tensors
from dist_ckpt.state.told import Say, accepts


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


def _raw_state(module: nn.Module) -> Mapping[str, Any]:
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
class _Owners:
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
    owners = _Owners(module)
    for raw_name, value in _raw_state(module).items():
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
    owners = _Owners(module)
    entries: dict[str, ModuleEntry] = {}
    for raw_name, value in _raw_state(module).items():
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
    owners = _Owners(module)
    found: dict[int, str] = {}
    for raw_name, value in _raw_state(module).items():
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


def _extra_state_names(module: nn.Module, names: Callable[[str], str]) -> Iterator[str]:
    """Yield the names under which modules take extra state, whether they have some now or not."""
    for prefix, each in module.named_modules():
        if type(each).set_extra_state is not nn.Module.set_extra_state:
            yield names(f"{prefix}._extra_state" if prefix else "_extra_state")


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
    fitting.place(required)
    fitting.take_extra_states(set(_extra_state_names(module, names)))
    found = fitting.found
    others = fitting.unclaimed()
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
        if self._again is None:
            self._again = _raw_state(self._module)
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
        state = {
            self._wanted[name].raw_name: _meta(stored.tensors[partner])
            for name, partner in found.partner.items()
            if name in self._wanted and self._wanted[name].live
        }
        state.update({name: _meta(stored.tensors[name]) for name in others})
        absent = {self._wanted[n].raw_name for n in missing if not stored.selects(n)}
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
        found.targets.missing[:] = [name for name in missing if not stored.selects(name)]

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
