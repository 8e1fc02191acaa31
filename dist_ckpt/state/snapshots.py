"""Values that are copies of something's state: as parts of a training they can only go stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.state.holders import is_of_module

# By the keys that tell them: what torch's `state_dict` methods return, each a new dict per call.
_SHAPES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"state", "param_groups"}), "an optimizer"),
    (frozenset({"last_epoch", "_step_count"}), "a learning rate scheduler"),
    (frozenset({"last_epoch", "num_bad_epochs"}), "a learning rate scheduler"),
    (frozenset({"scale", "growth_factor", "_growth_tracker"}), "a GradScaler"),
    (frozenset({"epoch", "consumed", "global_batch", "shuffle"}), "an ElasticSampler"),
    (frozenset({"_snapshot", "_steps_since_snapshot"}), "a StatefulDataLoader"),
)
_EXTRA = "_extra_state"
# Of Python's generator: the words of the Mersenne Twister, and the place in them.
_WORDS = 625
_DEEPEST = 8


def refuse_snapshots(part: str, value: object) -> None:
    """Check that nothing in `value` is a copy of a state that goes on without it.

    Dicts of tensors are no copies: the state dict of a module holds the memory of its parameters.

    Raises:
        UsageError: something is; says what to give instead.
    """
    for where, what in _snapshots(value, part, 0):
        kind = what.split(" ", 1)[1]
        raise UsageError(
            f"{where} is what state_dict() of {what} returned: a copy, which training does not "
            f"change and a load does not bring back. Give the {kind} itself as a part "
            "(a dict that was saved before can be read by open_checkpoint(...).read_values(...))"
        )


def refuse_generator_states(part: str, value: object) -> None:
    """Check that `value` is no copy of the state of a random number generator, nor a tuple of some.

    Each save would store it as it was, and whoever sets a generator by it after a restart draws the
    numbers of the beginning again.

    Raises:
        UsageError: something is; says what to give instead.
    """
    for where, what in _generator_states(value, part):
        raise UsageError(
            f"{where} is what {what} returned: a copy, which is the same at each save. Leave it "
            "out, for the generators of Python, numpy, torch and CUDA are part of every state; a "
            "generator of your own is a part itself"
        )


def refuse_state_dict(state: Mapping[str, object], parts: Mapping[str, object]) -> None:
    """Check that a state is not what `state_dict` of a module or an optimizer returned.

    Each entry would be a part, of a name that the next load of the object does not ask for.

    Args:
        state: what was given.
        parts: the entries of it that are parts.

    Raises:
        UsageError: it is; says what to give instead.
    """
    if _kind(parts) == "an optimizer":
        what = "an optimizer"
    elif _is_of_module(state, parts):
        what = "a module"
    else:
        return
    called = "model" if what == "a module" else "optimizer"
    raise UsageError(
        f"a state is a TrainState or a dict of parts by name, and this is what state_dict() of "
        f"{what} returned ({', '.join(list(parts)[:3])}, ...): each entry would be a part. Give "
        f'{{"{called}": {called}}}'
    )


def _is_of_module(state: Mapping[str, object], parts: Mapping[str, object]) -> bool:
    # No part has a dot in its name. What torch marks and has no dots is one of a single layer.
    if any("." in name and isinstance(item, torch.Tensor) for name, item in parts.items()):
        return True
    return (
        is_of_module(state)
        and bool(parts)
        and all(isinstance(item, torch.Tensor) or key == _EXTRA for key, item in parts.items())
    )


def refuse_class(part: str, value: object) -> None:
    """Check that `value` is no class whose objects would be a part.

    Raises:
        UsageError: it is.
    """
    if isinstance(value, type) and hasattr(value, "state_dict"):
        raise UsageError(
            f"part {part!r} is {value.__qualname__}, a class, not an object of it: give what "
            f"{value.__qualname__}(...) returned"
        )


def _snapshots(value: object, where: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        return
    if isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _snapshots(item, f"{where}[{at}]", depth + 1)
    if not isinstance(value, Mapping):
        return
    kind = _kind(value)
    if kind is not None:
        yield where, kind
        return
    extra = [key for key in _module_entries(value) if str(key).endswith(_EXTRA)]
    if extra:
        yield f"{where}[{extra[0]!r}]", "a module"
    for key, item in value.items():
        yield from _snapshots(item, f"{where}[{key!r}]", depth + 1)


def _generator_states(value: object, where: str) -> Iterator[tuple[str, str]]:
    what = _generator_of(value)
    if what is not None:
        yield where, what
    elif isinstance(value, tuple):
        # What stands in a list or a dict may be another one by the time of the next save.
        for at, item in enumerate(value):
            yield from _generator_states(item, f"{where}[{at}]")


def _generator_of(value: object) -> str | None:
    if isinstance(value, Mapping):
        return "bit_generator.state" if value.keys() >= {"bit_generator", "state"} else None
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.uint8 or value.device.type != "cpu":
            return None
        return "torch.get_rng_state()" if torch.equal(value, torch.get_rng_state()) else None
    if not isinstance(value, tuple):
        return None
    if len(value) == 5 and isinstance(value[0], str) and isinstance(value[1], np.ndarray):
        return "np.random.get_state()"
    if len(value) == 3 and isinstance(value[1], tuple) and len(value[1]) == _WORDS:
        return "random.getstate()"
    return None


def _kind(value: Mapping[Any, Any]) -> str | None:
    keys = value.keys()
    for shape, what in _SHAPES:
        if keys >= shape:
            if "param_groups" in shape and not _is_optimizer(value):
                continue
            return what
    return None


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    groups, state = value["param_groups"], value["state"]
    return (
        isinstance(state, Mapping)
        and isinstance(groups, (list, tuple))
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def _module_entries(value: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the keys of the state dict of a module under which no tensor is."""
    if is_of_module(value):
        yield from (key for key, item in value.items() if not isinstance(item, torch.Tensor))
