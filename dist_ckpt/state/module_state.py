"""A module as it shows itself: names without wrappers, entries, and who has a say in a load."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.random import fork_rng

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    UsageError,
)
from dist_ckpt.state.layout import (
    is_wrapped,
)
from dist_ckpt.state.spread import inner_tensors

# Canonical names: what a parameter is called whatever the module is wrapped in.


# Known by their full names, so that none of them is imported for the question alone. Value: the
# attribute that holds the wrapped module.
_WRAPPERS: dict[tuple[str, str], str] = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("lightning.fabric.wrappers", "_FabricModule"): "_forward_module",
    ("lightning_fabric.wrappers", "_FabricModule"): "_forward_module",
    # Not to be taken off by a user, but averaged weights are to load into a plain model, too.
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
}
# Of these the names are met in stored files only: no module here is one.
_ELSEWHERE = ("_fsdp_wrapped_module", "_fpw_module")
_WRAPPED_IN = frozenset((*_WRAPPERS.values(), *_ELSEWHERE))
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def wrapped_attribute(module: nn.Module) -> str | None:
    """Return the attribute under which the wrapper `module` holds what it wraps, if it is one."""
    # All bases, because frameworks subclass DDP.
    for cls in type(module).__mro__:
        attribute = _WRAPPERS.get((cls.__module__, cls.__qualname__))
        if attribute is not None:
            return attribute
    return None


def canonical_name(root: nn.Module, name: str) -> str:
    """Return `name`, an entry of the state dict of `root`, without what wrappers put into it.

    Only a component under which a wrapper of the module tree really holds its module is
    dropped: a submodule that a user called `module` keeps its name.
    """
    node: object = root
    kept: list[str] = []
    for component in name.split("."):
        dropped = False
        # Some wrappers take their component out of the names by a hook, others leave it in.
        while isinstance(node, nn.Module) and (attribute := wrapped_attribute(node)) is not None:
            node = getattr(node, attribute)  # go in, whether the name says so or not
            if component == attribute:
                dropped = True
                break
        if not dropped:
            kept.append(component)
            node = getattr(node, component, None)  # a parameter ends the walk
    return ".".join(kept)


def refuse_fsdp1(root: nn.Module, part: str) -> None:
    """Raise `UsageError` if `root` holds a module whose parameters are flat and nameless."""
    for name, module in root.named_modules():
        if any((cls.__module__, cls.__qualname__) == _FSDP1 for cls in type(module).__mro__):
            raise UsageError(
                f"{part} holds a FullyShardedDataParallel module at {name or 'its root'!r}, which "
                "flattens its parameters: shard it with torch.distributed.fsdp.fully_shard. Or let "
                "torch name them: dcp.save of get_state_dict(model, optimizer) with "
                "storage_writer=dist_ckpt.dcp.Writer(run), and dcp.load with dist_ckpt.dcp.Reader; "
                "what is saved so loads into any other layout by dist_ckpt.load"
            )


def partners(
    wanted: Collection[str], stored: Collection[str], *, is_foreign: bool
) -> dict[str, str]:
    """Return the stored name for each wanted one that has a partner.

    That is the same name. What has none is looked for without the names that wrappers put in front
    of or into others (`module.`, `_orig_mod.`): a dict of tensors does not say what it was wrapped
    in, nor does a wrapper that nobody here knows. Two that would fall together are no partners.
    Where not one is found, and another program gave the names, what all names of one side begin
    with is left away (`model.`, of a module in which the network is an attribute), if one side then
    is in the other. A model of the program's own that is another one is told so.
    """
    found = {name: name for name in wanted if name in stored}
    loose = [name for name in stored if name not in found]
    without: dict[str, str | None] = {}
    for name in loose:
        short = _without_wrappers(name)
        without[short] = None if short in without else name
    asked: dict[str, str | None] = {}
    for name in wanted:
        if name not in found:
            short = _without_wrappers(name)
            asked[short] = None if short in asked else name
    for short, asking in asked.items():
        partner = without.get(short)
        if asking is not None and partner is not None:
            found[asking] = partner
    if found or not is_foreign:
        return found
    return _without_beginning(_known(asked), _known(without))


def _known(names: Mapping[str, str | None]) -> dict[str, str]:
    return {short: name for short, name in names.items() if name is not None}


def _without_beginning(wanted: dict[str, str], stored: dict[str, str]) -> dict[str, str]:
    """Return the partners of names of which one side has a beginning that the other lacks."""
    for shorter, other, are_wanted in ((stored, wanted, False), (wanted, stored, True)):
        rest = shorter
        while (first := _beginning(rest)) is not None:
            rest = {name.removeprefix(first): full for name, full in rest.items()}
            common = rest.keys() & other.keys()
            if common and len(common) in (len(rest), len(other)):
                if are_wanted:
                    return {rest[name]: other[name] for name in common}
                return {other[name]: rest[name] for name in common}
    return {}


def _beginning(names: Collection[str]) -> str | None:
    """Return the component that all `names` begin with, and its dot; None without one."""
    firsts = {name.partition(".")[0] for name in names if "." in name}
    if len(firsts) != 1 or not all("." in name for name in names):
        return None
    return f"{firsts.pop()}."


def wrapper_prefix(names: Collection[str]) -> str:
    """Return what a wrapper put in front of all `names`, dots included; empty without one.

    Not of a name without dots: that is the wrapper's own (how often it has averaged).
    """
    inner = [name.split(".") for name in names if "." in name]
    prefix = ""
    while inner and len(firsts := {parts[0] for parts in inner if len(parts) > 1}) == 1:
        first = firsts.pop()
        if first not in _WRAPPED_IN or any(len(parts) == 1 for parts in inner):
            break
        prefix += f"{first}."
        inner = [parts[1:] for parts in inner]
    return prefix


def _without_wrappers(name: str) -> str:
    *inner, last = name.split(".")
    return ".".join([each for each in inner if each not in _WRAPPED_IN] + [last])


# What the state dict of a module is made of.


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
    owners = _Owners(module)
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
    owners = _Owners(module)
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


# Modules that have a say when they are loaded: hooks, and methods that replace torch's own.
#
# Most modules have none, and their tensors are filled where they lie without their knowledge. The
# others are given a state dict as torch gives it to them. What they would make of names that differ
# is found out before anything changes, on a shadow of the module that has shapes and no memory.


# Where torch's own hooks and methods are defined: with the same names and shapes on both sides
# they copy, or put FSDP2's parameters in place, which the state dict does as well.
_TORCH = "torch."


def told_root(module: nn.Module) -> nn.Module:
    """Return the module whose `load_state_dict` is called: `module` without wrappers around it.

    A wrapper that has nothing of its own (DDP, compiled modules) passes a state dict on and does
    not call the `load_state_dict` of what it wraps, which a program may have replaced.
    """
    while (attribute := wrapped_attribute(module)) is not None:
        own = (
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
            *_load_hooks(module),
            *module._state_dict_hooks.values(),  # noqa: SLF001
        )
        inner = getattr(module, attribute)
        # An instance may have been given its method by hand, a class of torch's has torch's.
        if own or not isinstance(inner, nn.Module) or "load_state_dict" in vars(module):
            break
        module = inner
    return module


class Say:
    """Who in the tree of `root` has a say.

    Attributes:
        root: what is told, see `told_root`.
        whole: whether its `load_state_dict` is not torch's.
        inside: the modules below which something is not torch's.
        after: whether there are hooks that are called after a load.
        any: whether anything at all is replaced or hooked, by torch's own modules too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.root = told_root(module)
        self.whole = "load_state_dict" in vars(self.root) or not _is_torchs(
            type(self.root).load_state_dict
        )
        self.inside: list[nn.Module] = []
        self.after = False
        self.any = self.whole
        for each in self.root.modules():
            hooks = list(each._load_state_dict_pre_hooks.values())  # noqa: SLF001
            method = type(each)._load_from_state_dict  # noqa: SLF001
            own = "_load_from_state_dict" in vars(each)
            if own or not _is_torchs(method) or not all(map(_is_torchs, hooks)):
                self.inside.append(each)
            after = bool(each._load_state_dict_post_hooks)  # noqa: SLF001
            self.after |= after
            plain = method is nn.Module._load_from_state_dict  # noqa: SLF001
            # A hook called after a load may take names off the lists of what did not fit.
            self.any |= own or bool(hooks) or not plain or after

    @property
    def foreign(self) -> bool:
        """Whether a method or hook that is not torch's must see what is loaded."""
        return self.whole or bool(self.inside)

    def seen(self) -> set[int]:
        """Return the ids of the tensors that such a method or hook sees before they are loaded."""
        modules = [self.root] if self.whole else self.inside
        tensors = ((*module.parameters(), *module.buffers()) for module in modules)
        return {id(tensor) for each in tensors for tensor in each}


def told_entries(say: Say, part: str) -> dict[str, ModuleEntry]:
    """Return the entries of what is told, which may be inside of the wrapper that was given."""
    return module_entries(say.root, ParameterNames(say.root).current(), part)


def accepts(say: Say, state: Mapping[str, torch.Tensor], *, absent: Collection[str]) -> bool:
    """Tell whether the module would load a state dict of these names and shapes, strictly.

    Args:
        say: the module.
        state: tensors on the meta device by raw name. Extra state is left out: it is no name that
            a module migrates, and what takes it would take it here.
        absent: names that may be missing: what is not to be loaded.
    """
    if "load_state_dict" in vars(say.root):
        return False  # bound to the real module, it would load that
    # A program that makes tensors while it loads makes them with memory, into which nothing can be
    # copied from here: then once more with all that is made having none.
    return any(_accepts(say, state, absent, device) for device in (nullcontext(), _META))


_META = torch.device("meta")


def _accepts(
    say: Say,
    state: Mapping[str, torch.Tensor],
    absent: Collection[str],
    device: AbstractContextManager[Any],
) -> bool:
    try:
        # What it draws, it draws when it is loaded.
        with torch.no_grad(), warnings.catch_warnings(), fork_rng(devices=[]), device:
            warnings.simplefilter("ignore")  # torch warns of what goes to the meta device
            found = _load(_shadow(say.root, {}, {}), dict(state), lenient=True)
    except Exception:
        return False  # whoever cannot take it says so by any exception
    missing = set(found.missing_keys) - set(absent)
    return not found.unexpected_keys and all(name.endswith("_extra_state") for name in missing)


def note_of_taken(part: str, missing: Collection[str], others: Collection[str]) -> str | None:
    """Say what a module took as no error though it had no partner; None if it migrates the others.

    Args:
        part: what the module is called.
        missing: its entries that are not stored, which `accepts` found to be none it minds.
        others: the stored names without an entry, likewise.
    """
    if bool(missing) == bool(others):
        return None  # what is missing is made of the others
    what = "has no value for" if missing else "has, without an entry in this module,"
    return (
        f"the checkpoint {what} {some_of(f'{part}/{name}' for name in missing or others)}, "
        "which the hooks or methods of the module took as no error"
    )


def some_of(given: Iterable[str]) -> str:
    """Return the first of the names that were `given`, and how many more there are."""
    names = sorted(given)
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def tell_part(say: Say, state: Mapping[str, Any], *, lenient: bool) -> list[str]:
    """Load `state`, in which live tensors stand for themselves; return the names that are unknown.

    Raises:
        Exception: whatever the module raises.
    """
    found = _load(say.root, dict(state), lenient=lenient or not say.whole)
    if say.after and not lenient:
        # One that a module migrates from may have had no extra state.
        _check_said(each for each in found.missing_keys if not each.endswith("_extra_state"))
    return list(found.unexpected_keys)


def tell_after(say: Say, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Call the hooks that are to be called after a load, children first, as torch does.

    Args:
        say: the module.
        missing: the names that were loaded by nothing.
        unexpected: the stored ones that went nowhere.

    Raises:
        Exception: whatever a hook raises, or it says that more is missing or unexpected.
    """
    keys = _IncompatibleKeys([*missing], [*unexpected])

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        for hook in module._load_state_dict_post_hooks.values():  # noqa: SLF001
            hook(module, keys)

    if say.after:
        visit(say.root)
        _check_said({*keys.missing_keys, *keys.unexpected_keys}.difference(missing, unexpected))


def _check_said(more: Iterable[str]) -> None:
    """Raise if a hook added to what is missing or unexpected, which is how one refuses a load."""
    said = sorted(more)
    if said:
        raise IncompatibleError(
            f"a hook called after the load refused it: {', '.join(map(repr, said))}",
            kind=ErrorKind.STATE_MISMATCH,
        )


def _load(root: nn.Module, state: dict[str, Any], *, lenient: bool) -> Any:
    if not lenient:
        result = root.load_state_dict(state)
    else:
        try:
            result = root.load_state_dict(state, strict=False)
        except TypeError:
            result = root.load_state_dict(state)  # one that has no such option
    # One that is not torch's may return nothing.
    if isinstance(result, tuple) and hasattr(result, "unexpected_keys"):
        return result
    return _IncompatibleKeys([], [])


def _load_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return [
        *module._load_state_dict_pre_hooks.values(),  # noqa: SLF001
        *module._load_state_dict_post_hooks.values(),  # noqa: SLF001
    ]


def _is_torchs(function: Any) -> bool:
    inner = getattr(function, "hook", function)  # torch wraps what it is given
    home = getattr(inner, "__module__", None) or type(inner).__module__
    return f"{home}.".startswith(_TORCH)


_CONTAINERS = frozenset({list, dict, set, OrderedDict, defaultdict, deque})


def _shadow(
    module: nn.Module, shadows: dict[int, nn.Module], tensors: dict[int, torch.Tensor]
) -> nn.Module:
    """Return a module of the same kind and hooks, whose tensors are on the meta device."""
    known = shadows.get(id(module))
    if known is not None:
        return known
    # Not `__init__`, nor a `__new__` that knows better (FSDP2's gives the class without FSDP).
    shadow: nn.Module = object.__new__(type(module))
    shadows[id(module)] = shadow
    # What a load notes in a list of the module's must not be noted there by this.
    content = {
        name: copy.copy(value) if type(value) in _CONTAINERS else value
        for name, value in vars(module).items()
    }
    for kind in ("_parameters", "_buffers"):
        content[kind] = {
            name: None if tensor is None else _meta(tensor, tensors)
            for name, tensor in content[kind].items()
        }
    content["_modules"] = {
        name: None if child is None else _shadow(child, shadows, tensors)
        for name, child in content["_modules"].items()
    }
    vars(shadow).update(content)
    for kind in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        hooks = content[kind].items()
        vars(shadow)[kind] = {key: _rebound(hook, shadows) for key, hook in hooks}
    return shadow


def _meta(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    meta = known.get(id(tensor))
    if meta is None:
        # The global shape, without layout: no rank asks another here.
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
        known[id(tensor)] = meta
    return meta


def _rebound(hook: Any, shadows: Mapping[int, nn.Module]) -> Any:
    """Return `hook` such that it sees the shadow of the module that it was registered with."""
    if isinstance(hook, MethodType):
        shadow = shadows.get(id(hook.__self__))
        return hook if shadow is None else MethodType(hook.__func__, shadow)
    if not hasattr(hook, "with_module"):
        return hook
    again = copy.copy(hook)
    again.hook = _rebound(hook.hook, shadows)
    if hook.with_module:
        shadow = shadows.get(id(hook.module()))
        if shadow is not None:
            again.module = lambda: shadow
    return again
