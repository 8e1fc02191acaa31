"""Reading and writing what a live optimizer keeps: in its attributes, or by its own two methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim import AdamW, Optimizer

from dist_ckpt.errors import CheckpointError, IncompatibleError, describe
from dist_ckpt.state.groups import View, options_of
from dist_ckpt.state.optimizer_content import Content, check_own
from dist_ckpt.state.optimizer_faces import (
    inner_optimizers,
    is_container,
    is_given,
    is_told,
    is_zero,
)

INNER = "inner."
PACKED = "@optimizer"
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
            which `{PACKED: prefix}` stands for one of `optimizers`.
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
            for name, parameter in mine.items():
                # By `get`, since reading an absent key of `state` would create it.
                state[name] = holder.state.get(parameter, {})
        shared: dict[Any, Any] = {}
        for holder in self._holders:
            shared |= check_own(holder.state, view, self._part)
        options = {name: options_of(group) for name, group in view.groups.items()}
        return Reading(prefix, {prefix: (view, Content(state, options, shared))})

    def write(self, told: Reading) -> None:
        """See `Live.write`. Nothing here can fail: all is decoded and has its place."""
        view, content = told.optimizers[told.prefix]
        for holder, mine in self._shares(view):
            holder.state.clear()
            for name, parameter in mine.items():
                if name in content.state:
                    holder.state[parameter] = content.state[name]
        self._holders[0].state.update(content.shared)
        for name, options in content.options.items():
            group = view.groups[name]
            for key, value in options.items():
                group[key] = _in_place(group.get(key), value)
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


class ByContract:
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
        unpack = _Unpacking(told, names, {"": self._optimizer, **self._inner})
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
    if is_zero(optimizer):
        # Each rank has the state of its own parameters in an optimizer inside, and only a
        # collective that copies all of it to one rank would let `state_dict` tell of it.
        return InAttributes([optimizer.optim], part, face=optimizer, alone=True, inside=True)
    inner = list(inner_optimizers(optimizer).values())
    if inner and is_container(optimizer) and not any(is_told(i) or is_given(i) for i in inner):
        return InAttributes(inner, part, alone=True, inside=True)
    if is_told(optimizer) or is_given(optimizer):
        return ByContract(optimizer, part)
    return InAttributes([optimizer], part, alone=not inner)


class _Unpacking:
    """Finds in what an optimizer tells all that has the form of torch's `state_dict`."""

    def __init__(self, told: Reading, names: Mapping[int, str], holders: Mapping[str, Any]) -> None:
        self._told = told
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
            {key: each for key, each in value["state"].items() if not _is_id(key, names)},
        )
        self._told.optimizers[prefix] = (view, content)
        return True

    def skeleton(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return `value` with marks in the places of what was taken."""
        prefix = f"{self._told.prefix}{INNER}{'.'.join(path)}."
        if self.take(value, prefix):
            # An entry beside the two that torch has is the wrapper's own.
            more = {
                k: self.skeleton(v, (*path, str(k))) for k, v in value.items() if k not in _KEYS
            }
            return {PACKED: prefix, **more}
        if type(value) is dict:
            return {k: self.skeleton(v, (*path, str(k))) for k, v in value.items()}
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
        more = {key: _filled(each, packed) for key, each in value.items() if key != PACKED}
        if PACKED not in value:
            return more
        if value[PACKED] not in packed:
            raise IncompatibleError(
                f"the checkpoint has the state of an optimizer as {value[PACKED]!r}, and this "
                "program has none there: build the optimizer that was saved"
            )
        return {**packed[value[PACKED]], **more}
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


def _in_place(live: Any, value: Any) -> Any:
    """Return what an option becomes: a live tensor stays itself and takes the value."""
    if isinstance(live, torch.Tensor) and isinstance(value, (torch.Tensor, int, float)):
        new = torch.as_tensor(value)
        with torch.no_grad():
            return live.copy_(new) if new.shape == live.shape else new
    if isinstance(live, tuple) and isinstance(value, tuple) and len(live) == len(value):
        return tuple(map(_in_place, live, value))
    # The program decides if a rate is a tensor; a float32 becomes the same number as a float.
    if isinstance(value, torch.Tensor) and isinstance(live, (int, float)):
        return value.item()
    return value
