"""Reading and writing what a live optimizer keeps, and whose state it is the face of.

torch's own optimizers keep everything in `state` and `param_groups`. An object that overrides
`state_dict`, or has hooks on it, may keep more, or keep it elsewhere; wrappers and containers have
other optimizers inside.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.optim import AdamW, Optimizer

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    UsageError,
    describe,
)
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import empty_beside
from dist_ckpt.state.optimizer_content import (
    Capture,
    Content,
    Notes,
    View,
    check_own,
    check_shared,
    options_of,
    tensor_notes,
)
from dist_ckpt.state.part import Stored, Targets
from dist_ckpt.state.rng import Generator

_INNER = "inner."
_PACKED = "@optimizer"
"""The key that stands, in what an optimizer tells, for the state of one of torch's form."""

_KEYS = ("state", "param_groups")


@dataclass(slots=True)
class Reading:
    """What an optimizer keeps.

    Attributes:
        prefix: what the names of all begin with.
        optimizers: those of torch's form, by the prefix of their names; that of the face is there
            if it has this form.
        further: by its place, what else the face tells: a pair of the key and of the value, in
            which `{_PACKED: prefix}` stands for one of `optimizers`.
    """

    prefix: str
    optimizers: dict[str, tuple[View, Content]] = field(default_factory=dict)
    further: dict[str, tuple[Any, Any]] = field(default_factory=dict)


class Live(Protocol):
    """How one optimizer is read and written.

    Attributes:
        in_place: whether its tensors may be filled where they lie.
        steps_alone: whether nothing but its `step` changes its tensors and parameters.
        reads_inner: whether what the optimizers inside of it keep is read as its own.
    """

    in_place: bool
    steps_alone: bool
    reads_inner: bool

    def read(self, names: Mapping[int, str], prefix: str) -> Reading:
        """Return what it keeps now; `names` are those of parameters of models, by `id`."""
        ...

    def write(self, told: Reading) -> None:
        """Make it keep `told`, which has the views of a `read` just before."""
        ...


class InAttributes:
    """Optimizers that keep everything in `state` and `param_groups`.

    Args:
        holders: those that have the state, each of parameters of its own.
        part: what it is called, for messages.
        face: the one whose groups a scheduler changes; None where the holders' own are these.
        alone: see `Live.steps_alone`.
        inside: whether the holders are inside of the face.
    """

    in_place = True

    def __init__(
        self,
        holders: Sequence[Optimizer],
        part: str,
        *,
        face: Any | None = None,
        alone: bool,
        inside: bool = False,
    ) -> None:
        self.steps_alone = alone
        self.reads_inner = inside
        self._holders = list(holders)
        self._face = face
        self._part = part

    def read(self, names: Mapping[int, str], prefix: str) -> Reading:
        """See `Live.read`."""
        view = View.of(self._groups(), names, prefix=prefix)
        state: dict[str, Any] = {}
        for holder, mine in self._shares(view):
            # Never by `state[parameter]`, which creates what is absent and asks a number that has
            # the hash of a parameter whether it is equal to it.
            kept = {id(key): each for key, each in holder.state.items() if torch.is_tensor(key)}
            for name, parameter in mine.items():
                state[name] = kept.get(id(parameter), {})
        shared: dict[Any, Any] = {}
        for holder in self._holders:
            shared |= check_own(holder.state, view, self._part)
        options = {name: options_of(group) for name, group in view.groups.items()}
        return Reading(prefix, {prefix: (view, Content(state, options, shared))})

    def write(self, told: Reading) -> None:
        """See `Live.write`. Nothing here can fail: all is decoded and has its place."""
        view, content = told.optimizers[told.prefix]
        for holder, mine in self._shares(view):
            # Never another dict: this very one may be the state of a wrapper, too (`shares_state`).
            holder.state.clear()
            for name, parameter in mine.items():
                if name in content.state:
                    holder.state[parameter] = content.state[name]
        # What belongs to no parameter has no holder of its own, and `read` joins that of all.
        self._holders[0].state.update(content.shared)
        filled: set[int] = set()
        for name, options in content.options.items():
            group = view.groups[name]
            for key, value in options.items():
                group[key] = _in_place(group.get(key), value, filled)
        for holder in self._holders:
            if self._face is not None:
                # It takes its options over from the face before each step only.
                for mine_group, group in zip(holder.param_groups, self._groups(), strict=True):
                    mine_group.update(options_of(group))
            for group in holder.param_groups if isinstance(holder, AdamW) else ():
                # An Adam's checkpoint must not make one of it; torch sees to that likewise.
                if "decoupled_weight_decay" in group:
                    group["decoupled_weight_decay"] = True

    def _groups(self) -> Iterator[dict[str, Any]]:
        if self._face is not None:
            return iter(self._face.param_groups)
        return (group for holder in self._holders for group in holder.param_groups)

    def _shares(self, view: View) -> Iterator[tuple[Optimizer, dict[str, torch.Tensor]]]:
        for holder in self._holders:
            if len(self._holders) == 1 and self._face is None:
                yield holder, view.parameters
                continue
            mine = {id(p) for group in holder.param_groups for p in group["params"]}
            yield holder, {n: p for n, p in view.parameters.items() if id(p) in mine}


class _ByContract:
    """An optimizer that is asked by `state_dict` or given by `load_state_dict`, or both."""

    in_place = False  # a load_state_dict may compare old with new
    steps_alone = False
    reads_inner = False

    def __init__(self, optimizer: Any, part: str) -> None:
        self._optimizer = optimizer
        self._part = part
        self._inner = inner_optimizers(optimizer)
        self._plain = InAttributes([optimizer], part, alone=False)

    def read(self, names: Mapping[int, str], prefix: str) -> Reading:
        """See `Live.read`."""
        if not is_told(self._optimizer):
            return self._plain.read(names, prefix)
        state_dict = self._optimizer.state_dict()
        told = Reading(prefix)
        unpack = _Unpacking(told, names, {"": self._optimizer, **self._inner}, self._part)
        if not isinstance(state_dict, dict):
            told.further[""] = (None, unpack.skeleton(state_dict, ()))
            return told
        rest = dict(state_dict)
        if unpack.take(state_dict, prefix):
            rest = {key: value for key, value in rest.items() if key not in _KEYS}
        for key, value in rest.items():
            told.further[str(key)] = (key, unpack.skeleton(value, (str(key),)))
        return told

    def write(self, told: Reading) -> None:
        """See `Live.write`.

        Raises:
            IncompatibleError: `load_state_dict` refused.
        """
        packed = {prefix: _packed(*each) for prefix, each in told.optimizers.items()}
        if "" in told.further:
            state_dict = _filled(told.further[""][1], packed)
        else:
            state_dict = dict(packed.get(told.prefix, {}))
            state_dict |= {key: _filled(value, packed) for key, value in told.further.values()}
        try:
            self._optimizer.load_state_dict(state_dict)
        except CheckpointError:
            raise
        except Exception as error:
            kind = type(self._optimizer).__qualname__
            raise IncompatibleError(
                f"{self._part}: {kind}.load_state_dict refused what was saved: {describe(error)}"
            ) from error
        holders = [self._optimizer, *self._inner.values()]
        for view, content in told.optimizers.values():
            for name, entries in content.state.items():
                for holder in holders:
                    _uncast(getattr(holder, "state", None), view.parameters[name], entries)


def live_of(optimizer: Any, part: str) -> Live:
    """Return how `optimizer` is to be read and written."""
    if _is_zero(optimizer):
        # Each rank has the state of its own parameters in an optimizer inside, and only a
        # collective that copies all of it to one rank would let `state_dict` tell of it.
        return InAttributes([optimizer.optim], part, face=optimizer, alone=True, inside=True)
    inner = list(inner_optimizers(optimizer).values())
    # Before `is_told`, which is true of a container, too: its `state_dict` would take a step.
    if inner and _is_container(optimizer) and not any(is_told(i) or is_given(i) for i in inner):
        return InAttributes(inner, part, alone=True, inside=True)
    if is_told(optimizer) or is_given(optimizer):
        return _ByContract(optimizer, part)
    return InAttributes([optimizer], part, alone=not inner)


class _Unpacking:
    """Finds in what an optimizer tells all that has the form of torch's `state_dict`."""

    def __init__(
        self, told: Reading, names: Mapping[int, str], holders: Mapping[str, Any], part: str
    ) -> None:
        self._told = told
        self._part = part
        self._names = names
        self._holders = holders  # by where they are in the face, "" for itself
        self._taken: set[str] = set()

    def take(self, value: Any, prefix: str) -> bool:
        """Take `value` as one of torch's form, if it is and its parameters are known."""
        if not _is_packed(value):
            return False
        view = self._view(value, prefix)
        if view is None:
            return False
        ids = [i for group in value["param_groups"] for i in group["params"]]
        names = dict(zip(ids, view.parameters, strict=True))
        content = Content(
            {names[key]: each for key, each in value["state"].items() if _is_id(key, names)},
            {
                name: options_of(group)
                for name, group in zip(view.groups, value["param_groups"], strict=True)
            },
            check_shared(
                {key: each for key, each in value["state"].items() if not _is_id(key, names)},
                view,
                self._part,
            ),
        )
        self._told.optimizers[prefix] = (view, content)
        return True

    def skeleton(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return `value` with marks in the places of what was taken."""
        prefix = f"{self._told.prefix}{_INNER}{'.'.join(path)}."
        if self.take(value, prefix):
            # An entry beside the two that torch has is the wrapper's own.
            more = {
                k: self.skeleton(v, (*path, str(k))) for k, v in value.items() if k not in _KEYS
            }
            return {_PACKED: prefix, **more}
        if type(value) is dict:
            return {k: self.skeleton(v, (*path, str(k))) for k, v in value.items()}
        # Exactly these: a named tuple, for one, cannot be called with its items as one argument.
        if type(value) in (list, tuple):
            return type(value)(self.skeleton(v, (*path, str(i))) for i, v in enumerate(value))
        return value

    def _view(self, value: Any, prefix: str) -> View | None:
        """Return the names of the parameters that the numbers in `value` stand for."""
        sizes = [len(group["params"]) for group in value["param_groups"]]
        options = [options_of(group).keys() for group in value["param_groups"]]
        kept = {id(each) for entry in value["state"].values() for each in _tensors(entry)}
        best: tuple[tuple[bool, ...], str, View] | None = None
        for path, holder in self._holders.items():
            view = View.of(holder.param_groups, self._names, prefix=prefix)
            if view.sizes != sizes:
                continue
            state = getattr(holder, "state", None) or {}
            # Whose it is its tensors tell; before the first step its options, and where it is.
            likeness = (
                any(id(each) in kept for entry in state.values() for each in _tensors(entry)),
                options == [options_of(group).keys() for group in holder.param_groups],
                prefix.removesuffix(".").endswith(path.rpartition(".")[2]) and path != "",
                path not in self._taken,
            )
            if best is None or likeness > best[0]:
                best = (likeness, path, view)
        if best is None:
            return None
        self._taken.add(best[1])
        return best[2]


def _is_packed(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(number) is int for number in group["params"])
        for group in groups
    )


def _is_id(key: Any, names: Mapping[int, str]) -> bool:
    return type(key) is int and key in names


def _tensors(entry: Any) -> Iterator[torch.Tensor]:
    if isinstance(entry, dict):
        yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


def _packed(view: View, content: Content) -> dict[str, Any]:
    """Return `content` in torch's form."""
    ids = {name: number for number, name in enumerate(view.parameters)}
    groups = []
    for name, group in view.groups.items():
        options = {**options_of(group), **content.options.get(name, {})}
        listed = {"param_names": group["param_names"]} if "param_names" in group else {}
        groups.append({**options, **listed, "params": [ids[each] for each in view.members[name]]})
    state = {ids[name]: content.state[name] for name in ids if name in content.state}
    return {"state": {**state, **content.shared}, "param_groups": groups}


def _filled(value: Any, packed: Mapping[str, dict[str, Any]]) -> Any:
    """Return what a skeleton stands for."""
    if type(value) is dict:
        more = {key: _filled(each, packed) for key, each in value.items() if key != _PACKED}
        if _PACKED not in value:
            return more
        if value[_PACKED] not in packed:
            raise IncompatibleError(
                f"the checkpoint has the state of an optimizer as {value[_PACKED]!r}, and this "
                "program has none there: build the optimizer that was saved"
            )
        return {**packed[value[_PACKED]], **more}
    if type(value) in (list, tuple):
        return type(value)(_filled(each, packed) for each in value)
    return value


def _uncast(state: Any, parameter: torch.Tensor, given: Any) -> None:
    """Undo what a `load_state_dict` did to values that were as they have to be.

    torch's casts every moment to the dtype of its parameter, whatever it was before, and takes a
    text for a list of characters.
    """
    kept = state.get(parameter) if isinstance(state, Mapping) else None
    if not isinstance(kept, dict) or not isinstance(given, dict):
        return
    for key, value in given.items():
        other = kept.get(key)
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            if other.shape == value.shape and other.dtype != value.dtype:
                kept[key] = value
        elif isinstance(value, str) and key in kept:
            kept[key] = value


def _in_place(live: Any, value: Any, filled: set[int]) -> Any:
    """Return what an option becomes: a live tensor stays itself and takes the value.

    What its dtype or shape cannot hold is put in its place, as torch puts each; and so is what one
    that is the option of several groups cannot hold beside the value of another. The program
    decides that a number is a tensor of float32.

    Args:
        live: what it is.
        value: what is stored.
        filled: the ids of the live tensors that have taken a value, which is added to.
    """
    if isinstance(live, torch.Tensor) and isinstance(value, (int, float, torch.Tensor)):
        if id(live) in filled:
            other = _taken(live.clone(), value)
            if isinstance(other, torch.Tensor) and other.dtype == live.dtype:
                return live if torch.equal(other, live) else other
            return other
        taken = _taken(live, value)
        if taken is live:
            filled.add(id(live))
        return taken
    if isinstance(live, tuple) and isinstance(value, tuple) and len(live) == len(value):
        return tuple(_in_place(*each, filled) for each in zip(live, value, strict=True))
    # The program decides if a rate is a tensor; a float32 becomes the same number as a float.
    if isinstance(value, torch.Tensor) and isinstance(live, (int, float)):
        return value.item()
    return value


def _taken(live: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor | float:
    """Return `live` with `value` in it, or `value` where that does not fit."""
    if isinstance(value, torch.Tensor):
        if live.shape == value.shape and torch.equal(value.to(live.dtype).to(value.dtype), value):
            with torch.no_grad():
                return live.copy_(value)
        return value.to(live.device)
    if live.ndim or (isinstance(value, float) and not live.is_floating_point()):
        return value
    with torch.no_grad():
        return live.fill_(value)


# Whose state an optimizer is the face of, and by which way it must be asked for it.


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
    # A class has the methods of its objects; a module with such methods is a model first.
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


_TOLD = ("state", "param_groups", "defaults")


def kept_aside(optimizer: Optimizer) -> list[str]:
    """Return the attributes in which `optimizer` has a tensor for each parameter, or for some.

    Its `state_dict` does not tell of these, in torch as little as here.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return [
        name
        for name, value in vars(optimizer).items()
        if name not in _TOLD and _is_aside(value, parameters, 3)
    ]


def counted_aside(optimizer: Optimizer) -> list[str]:
    """Return the attributes in which `optimizer` counts or draws, which nobody is told of either.

    Those are numbers that its `step` sets, or a method that this calls, and generators.
    """
    kind: type = type(optimizer)
    steps = _set_by(kind, "step")
    return [
        name
        for name, value in vars(optimizer).items()
        if name not in _TOLD
        # No switch: what `initialized` tells is so again after a restart.
        and (isinstance(value, Generator) or (name in steps and type(value) in (int, float)))
    ]


# Read once: each save asks, and a class has its code for good.
@lru_cache(maxsize=64)
def _set_by(kind: type, method: str) -> frozenset[str]:
    """Return the names of the attributes that a method sets, or another one that it calls."""
    names: set[str] = set()
    asked, left = set(), [method]
    while left:
        name = left.pop()
        found = inspect.getattr_static(kind, name, None)  # asks no descriptor, which may raise
        code = getattr(inspect.unwrap(found) if callable(found) else None, "__code__", None)
        # torch's own classes have no such numbers.
        if name in asked or code is None or found.__module__.startswith("torch."):
            continue
        asked.add(name)
        for each in dis.get_instructions(code):
            if each.opname == "STORE_ATTR":
                names.add(each.argval)
            elif isinstance(each.argval, str):
                left.append(each.argval)
    return frozenset(names)


def _is_aside(value: object, parameters: Sequence[torch.Tensor], deepest: int) -> bool:
    """Tell whether `value` has tensors by parameter, or as many as there are, of their shapes."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        return False
    keys = [*value] if isinstance(value, Mapping) else []
    items = [*value.values()] if isinstance(value, Mapping) else [*value]
    tensors = [each for each in items if isinstance(each, torch.Tensor)]
    own = {id(each) for each in parameters}
    if any((key if isinstance(key, int) else id(key)) in own for key in keys):
        inner = (each for item in items if isinstance(item, Mapping) for each in item.values())
        return bool(tensors) or any(isinstance(each, torch.Tensor) for each in inner)
    if tensors and [each.shape for each in tensors] == [each.shape for each in parameters]:
        return not any(id(each) in own for each in tensors)  # else a list of the parameters
    return deepest > 1 and any(_is_aside(each, parameters, deepest - 1) for each in items)


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


def _is_zero(optimizer: object) -> bool:
    """Tell whether `optimizer` is torch's, whose every rank keeps the state of some parameters."""
    return any((cls.__module__, cls.__qualname__) == _ZERO for cls in type(optimizer).__mro__)


def _is_container(optimizer: object) -> bool:
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
    if inner and (kind.__name__ in _TRANSPARENT or _is_zero(optimizer) or _is_container(optimizer)):
        return "+".join(sorted({class_name(each) for each in inner}))
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def check_face(optimizer: Any, part: str) -> None:
    """Refuse an optimizer whose state cannot be kept.

    Raises:
        UsageError: it is one of those; the message has the way out.
    """
    if _is_zero(optimizer) and not isinstance(getattr(optimizer, "optim", None), Optimizer):
        raise UsageError(
            f"{part}: a ZeroRedundancyOptimizer with overlap_with_ddp=True keeps its state in no "
            "optimizer of torch's: leave that option out, or shard with fully_shard"
        )


def _has_hooks(optimizer: Any, of: str) -> bool:
    # torch has no public way to ask whether there are hooks (torch/optim/optimizer.py).
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


# What an optimizer keeps of its own, beside its parameters and groups.


_OWN = "own"
_MODE = "train_mode"
Parameters = Mapping[str, torch.Tensor]


class Own:
    """The further entries of one optimizer: `own.<key>` is that of `key` in its `state_dict`.

    Args:
        optimizer: the live one.
        part: what it is called, for messages.
        prefix: what its names begin with.
    """

    def __init__(self, optimizer: Any, part: str, prefix: str) -> None:
        self._optimizer = optimizer
        self._part = part
        self._prefix = prefix

    def write(self, told: Reading, parameters: Parameters, written: Capture) -> None:
        """Add the entries to what is written down."""
        for place, (key, value) in told.further.items():
            name = self._name(place)
            inner = written.add_value(name, {"key": key, "value": value})
            notes = tensor_notes(inner, None, parameters)
            if notes:
                note = encode(notes, path=f"{self._part}.{name}")
                written.objects[self._note_name(place)] = note
        mode = self._mode()
        if mode is not None:
            written.add_value(self._prefix + _MODE, mode)

    def find(
        self,
        stored: Stored,
        found: Targets,
        known: set[str],
        *,
        told: Reading,
        parameters: Parameters,
    ) -> None:
        """Add the targets of the entries, and their names.

        Args:
            stored: the checkpoint.
            found: receives the targets.
            known: receives the names of objects.
            told: what the live optimizer tells.
            parameters: its parameters by name.

        Raises:
            IntegrityError: an entry is malformed.
        """
        live = Capture(self._part)
        self.write(told, parameters, live)
        for place in told.further:
            if self._name(place) not in stored.objects:
                found.missing.append(self._name(place))
        if self._prefix + _MODE in live.objects:
            known.add(self._prefix + _MODE)
        for place, data in self._entries(stored, told).items():
            known.update((self._name(place), self._note_name(place)))
            notes = self._notes(stored, place)
            for name in references(data, path=f"{self._part}.{self._name(place)}"):
                if name not in stored.tensors:
                    raise self._malformed(place, f"names a tensor that is not stored: {name}")
                spec = stored.tensors[name]
                like = live.tensors.get(name)
                if like is None or tuple(like.shape) != spec.shape:
                    like = parameters.get(notes.like.get(name, ""), torch.empty(0))
                found.tensors[name] = notes.ordered(name, empty_beside(like, spec))

    def read(
        self, stored: Stored, tensors: Mapping[str, torch.Tensor], told: Reading
    ) -> dict[str, tuple[Any, Any]]:
        """Return the stored entries as they were told, and the live ones of what is not stored.

        Raises:
            IntegrityError: an entry is malformed.
        """
        further = dict(told.further)
        for place, data in self._entries(stored, told).items():
            pair = decode(data, tensors=tensors, path=f"{self._part}.{self._name(place)}")
            if not isinstance(pair, dict) or pair.keys() != {"key", "value"}:
                raise self._malformed(place, "is no entry of a state dict")
            further[place] = (pair["key"], pair["value"])
        return further

    def set_mode(self, stored: Stored) -> None:
        """Put a wrapper of the schedule-free kind into the mode in which it was saved."""
        data = stored.objects.get(self._prefix + _MODE)
        if data is not None and self._mode() is not None:
            self._optimizer.train_mode = bool(decode(data, tensors={}, path=self._part))

    def _mode(self) -> bool | None:
        # In one mode the parameters are the averages, in the other where gradients are taken. A
        # wrapper that only an attribute tells which would turn those into others at `train()`.
        mode = getattr(self._optimizer, "__dict__", {}).get(_MODE)
        return mode if isinstance(mode, bool) else None

    def _entries(self, stored: Stored, told: Reading) -> dict[str, bytes]:
        """Return by place what is stored; nothing where the live optimizer tells no such thing."""
        start = self._prefix + _OWN
        if not told.further:
            return {}
        return {
            name.removeprefix(start).removeprefix("."): data
            for name, data in stored.objects.items()
            if name == start or name.startswith(f"{start}.")
        }

    def _notes(self, stored: Stored, place: str) -> Notes:
        data = stored.objects.get(self._note_name(place))
        noted = {} if data is None else decode(data, tensors={}, path=self._part)
        return Notes.of_entry(noted if isinstance(noted, dict) else {})

    def _name(self, place: str) -> str:
        return f"{self._prefix}{_OWN}.{place}" if place else f"{self._prefix}{_OWN}"

    def _note_name(self, place: str) -> str:
        return f"{self._prefix}layout.{place}"

    def _malformed(self, place: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"stored {self._part}.{self._name(place)} {what}", kind=ErrorKind.MALFORMED
        )
