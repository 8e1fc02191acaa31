"""Whose state an optimizer is the face of, and by which way it must be asked for it.

torch's own optimizers keep everything in `state` and `param_groups`. An object that overrides
`state_dict`, or has hooks on it, may keep more, or keep it elsewhere; wrappers and containers have
other optimizers inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dist_ckpt.errors import UsageError

_ZERO = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
# These only pass on what the optimizer inside does and keeps: its checkpoints are theirs.
_TRANSPARENT = frozenset(
    {
        "AcceleratedOptimizer",
        "LightningOptimizer",
        "PostLocalSGDOptimizer",
        "_FabricOptimizer",
        "_NamedOptimizer",
    }
)
_METHODS = ("step", "state_dict", "load_state_dict")
_DEPTH = 3


def is_optimizer(value: object) -> bool:
    """Tell whether `value` is an optimizer, or anything that looks like one.

    That is what has `param_groups`, and the methods `step`, `state_dict` and `load_state_dict`: a
    wrapper need not be an optimizer by class.
    """
    if isinstance(value, Optimizer):
        return True
    if isinstance(value, type | torch.nn.Module):
        return False
    try:
        # By the object and not by its class: wrappers pass on what they do not know.
        looks_so = all(callable(getattr(value, method, None)) for method in _METHODS)
        groups = value.param_groups if looks_so else None  # type: ignore[attr-defined]
    except Exception:  # asking may run code of anybody's; what fails at that is no optimizer
        return False
    return isinstance(groups, list) and all(
        isinstance(group, dict) and "params" in group for group in groups
    )


def holds_optimizers(value: object) -> bool:
    """Tell whether `value` looks like an optimizer, or is a list or dict of optimizers alone."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple):
        return bool(items) and all(map(is_optimizer, items))
    return is_optimizer(value)


def is_told(optimizer: Any) -> bool:
    """Tell whether only its `state_dict` says what `optimizer` keeps."""
    own = getattr(type(optimizer), "state_dict", None) is Optimizer.state_dict
    # An attribute of the object itself takes the place of the method of its class.
    own = own and "state_dict" not in getattr(optimizer, "__dict__", {})
    return not own or _has_hooks(optimizer, "state_dict")


def is_given(optimizer: Any) -> bool:
    """Tell whether `optimizer` must be given a state by its `load_state_dict`."""
    kind = type(optimizer)
    own = getattr(kind, "load_state_dict", None) is Optimizer.load_state_dict
    own = own and "load_state_dict" not in getattr(optimizer, "__dict__", {})
    # What torch's classes do there can be had without it; of others nobody knows what they do.
    own = own and kind.__setstate__.__module__.startswith("torch.optim.")
    return not own or _has_hooks(optimizer, "load_state_dict")


def is_zero(optimizer: object) -> bool:
    """Tell whether `optimizer` is torch's, whose every rank keeps the state of some parameters."""
    return any((cls.__module__, cls.__qualname__) == _ZERO for cls in type(optimizer).__mro__)


def is_container(optimizer: object) -> bool:
    """Tell whether all that `optimizer` does is to hold others, and to flatten what these say.

    `get_optimizer_state_dict` makes an optimizer without state take a step, so that there is
    something to tell. A save that did so would change the run that it saves.
    """
    for cls in type(optimizer).__mro__:
        if "state_dict" in vars(cls):
            code = getattr(vars(cls)["state_dict"], "__code__", None)
            return code is not None and "get_optimizer_state_dict" in code.co_names
    return False


def inner_optimizers(face: object) -> dict[str, Any]:
    """Return the optimizers that are attributes of `face`, or in lists and dicts of these.

    One that shares its state with `face` is no other one. By where it is: `base_optimizer`,
    `optimizers.0`.
    """
    if type(face).__module__.startswith("torch.optim."):
        return {}  # nearly all there are
    attributes = face if isinstance(face, list | tuple | dict) else getattr(face, "__dict__", {})
    found: dict[str, Any] = {}
    seen = {id(face)}
    for path, value in _walk(attributes, (), _DEPTH):
        if id(value) not in seen:
            seen.add(id(value))
            found[".".join(path)] = value
    return found


def shares_state(face: Any, inner: Any) -> bool:
    """Tell whether what `face` keeps is just what `inner` keeps."""
    state = getattr(face, "state", None)
    return state is not None and state is getattr(inner, "state", None)


def class_name(optimizer: Any) -> str:
    """Return what `optimizer` is, as `package.Class`; of a mere wrapper what is inside."""
    kind = type(optimizer)
    inner = list(inner_optimizers(optimizer).values())
    if inner and (kind.__name__ in _TRANSPARENT or is_zero(optimizer) or is_container(optimizer)):
        return "+".join(sorted({class_name(each) for each in inner}))
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def check_face(optimizer: Any, part: str) -> None:
    """Refuse an optimizer whose state cannot be kept.

    Raises:
        UsageError: it is one of those; the message has the way out.
    """
    if is_zero(optimizer) and not isinstance(getattr(optimizer, "optim", None), Optimizer):
        raise UsageError(
            f"{part}: a ZeroRedundancyOptimizer with overlap_with_ddp=True keeps its state in no "
            "optimizer of torch's: leave that option out, or shard with fully_shard"
        )


def _has_hooks(optimizer: Any, of: str) -> bool:
    names = (f"_optimizer_{of}_pre_hooks", f"_optimizer_{of}_post_hooks")
    return any(getattr(optimizer, name, None) for name in names)


def _walk(value: Any, path: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], Any]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if isinstance(key, torch.Tensor):
            return  # the state of an optimizer: one entry for each parameter
        here = (*path, str(key))
        if isinstance(item, Mapping | list | tuple) and depth > 1:
            yield from _walk(item, here, depth - 1)
        elif is_optimizer(item):
            yield here, item
