"""Modules that have a say when they are loaded: hooks, and methods that replace torch's own.

Most modules have none, and their tensors are filled where they lie without their knowledge. The
others are given a state dict as torch gives it to them. What they would make of names that differ
is found out before anything changes, on a shadow of the module that has shapes and no memory.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.random import fork_rng

from dist_ckpt.state.names import wrapped_attribute

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
            self.after |= bool(each._load_state_dict_post_hooks)  # noqa: SLF001
            plain = method is nn.Module._load_from_state_dict  # noqa: SLF001
            self.any |= own or bool(hooks) or not plain

    @property
    def foreign(self) -> bool:
        """Whether a method or hook that is not torch's must see what is loaded."""
        return self.whole or bool(self.inside)

    def seen(self) -> set[int]:
        """Return the ids of the tensors that such a method or hook sees before they are loaded."""
        modules = [self.root] if self.whole else self.inside
        tensors = ((*module.parameters(), *module.buffers()) for module in modules)
        return {id(tensor) for each in tensors for tensor in each}


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


def tell_part(say: Say, state: Mapping[str, Any], *, lenient: bool) -> list[str]:
    """Load `state`, in which live tensors stand for themselves; return the names that are unknown.

    Raises:
        Exception: whatever the module raises.
    """
    return list(_load(say.root, dict(state), lenient=lenient or not say.whole).unexpected_keys)


def tell_after(say: Say) -> None:
    """Call the hooks that are to be called after a load, children first, as torch does."""

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        for hook in module._load_state_dict_post_hooks.values():  # noqa: SLF001
            hook(module, _IncompatibleKeys([], []))

    if say.after:
        visit(say.root)


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
