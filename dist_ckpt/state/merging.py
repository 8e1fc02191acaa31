"""Putting a stored value in the place of a live one: whoever holds the live one sees the change.

What can change in place does, at any depth: tensors and arrays take the numbers, dicts, lists,
sets, namespaces and buffers the content. Anything else (a number, a tuple) is another object
afterwards, in the container that holds it.
"""

from __future__ import annotations

from argparse import Namespace
from array import array
from collections import defaultdict, deque
from collections.abc import (
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
)
from dataclasses import dataclass, field, fields, is_dataclass
from functools import singledispatch
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError
from dist_ckpt.state.encoding import MAX_DEPTH, TAG, encode, is_wrapped_node
from dist_ckpt.state.layout import is_apart, is_wrapped, local_of
from dist_ckpt.state.spread import pieces


def held_containers(value: object) -> set[int]:
    """Return the ids of all dicts and lists in `value` that somebody else's tensors are in.

    That is what a state dict is, or a list of parameters: it neither gains nor loses an entry by a
    load, as the module does not whose tensors are in it.
    """
    found: set[int] = set()
    for each in _containers(value, 0):
        items = list(each.values()) if isinstance(each, Mapping) else each
        tensors = [item for item in items if isinstance(item, torch.Tensor)]
        named = not isinstance(each, Mapping) or all(isinstance(key, str) for key in each)
        alone = named and len(tensors) == len(items)
        # That of a module may have entries that are no tensors.
        if tensors and (is_of_module(each) or (alone and any(map(is_held, tensors)))):
            found.add(id(each))
    return found


_Container = Mapping[Any, Any] | list[Any] | tuple[Any, ...]


def _containers(value: object, depth: int) -> Iterator[_Container]:
    if depth > MAX_DEPTH or not isinstance(value, (Mapping, list, tuple)):
        return
    yield value
    for item in value.values() if isinstance(value, Mapping) else value:
        yield from _containers(item, depth + 1)


def named_misfits(
    live: object, node: Any, name: str, held: Collection[int]
) -> Iterator[tuple[str, bool]]:
    """Yield the names of tensors that only one side has, of all containers in `held`.

    Args:
        live: a value of the state.
        node: the parsed encoding of the stored one.
        name: what both are called.
        held: what `held_containers` found in `live`.

    Yields:
        The name, and whether it is the stored value that lacks it.
    """
    if isinstance(live, Mapping):
        stored = _entries(node)
        if id(live) in held:
            for key, value in live.items():
                if isinstance(value, torch.Tensor) and not _is_tensor(stored.get(key)):
                    yield f"{name}.{key}", True
            for key, item in stored.items():
                if key not in live and _is_tensor(item):
                    yield f"{name}.{key}", False
        for key, value in live.items():
            if key in stored:
                yield from named_misfits(value, stored[key], f"{name}.{key}", held)
    elif isinstance(live, (list, tuple)):
        items = node if isinstance(node, list) else _payload(node)
        if isinstance(items, list):
            if id(live) in held:
                for i in range(len(items), len(live)):
                    yield f"{name}.{i}", True
                for i in range(len(live), len(items)):
                    if _is_tensor(items[i]):
                        yield f"{name}.{i}", False
            for i, (value, item) in enumerate(zip(live, items, strict=False)):
                yield from named_misfits(value, item, f"{name}.{i}", held)


def _payload(node: Any) -> Any:
    # Not decoded yet: what is no encoding is found when it is.
    return node.get("v") if isinstance(node, dict) and TAG in node else None


def _entries(node: Any) -> dict[Any, Any]:
    """Return the entries of an encoded mapping whose keys are strings or small integers."""
    if isinstance(node, dict) and TAG not in node:
        return node
    pairs = _payload(node)
    if not isinstance(pairs, list):
        return {}
    found = {}
    for pair in pairs:
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int)):
            found[pair[0]] = pair[1]
    return found


def _is_tensor(node: Any) -> bool:
    return isinstance(node, dict) and (node.get(TAG) == "tensor" or is_wrapped_node(node))


class Merging:
    """Puts one stored value in the place of a live one.

    Args:
        held: the ids of the containers whose entries stay, see `held_containers`.
    """

    def __init__(self, held: Collection[int] = ()) -> None:
        self._held = held
        # What has taken a value, by its id, with that value. The live ones too, so that no id is
        # that of another object meanwhile.
        self._taken: dict[int, tuple[Any, Any]] = {}
        self._arrays: dict[int, _Filled] = {}

    def merged(self, live: Any, value: Any) -> Any:
        """Return what takes the place of `live`: itself with the content of `value`, if it can be.

        Tensors of `value` that are the memory of live ones are left as they are; those of equal
        shape and dtype are copied. A live object met twice takes one value; if the other is not
        the same, that stands beside it.
        """
        if id(live) in self._taken:
            return live if _are_same(self._taken[id(live)][1], value) else value
        made = self._merged(live, value)
        if made is live and not isinstance(live, torch.Tensor):  # those are compared before
            self._taken[id(live)] = (live, value)
        return made

    def _merged(self, live: Any, value: Any) -> Any:
        # An OrderedDict that was saved may come back to a dict: both are told by their keys.
        if isinstance(live, MutableMapping) and isinstance(value, MutableMapping):
            return _into(live, value, self)
        if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
            return _into_tensor(live, value)
        return _into(live, value, self) if type(live) is type(value) else value

    def filled(self, live: NDArray[Any], value: NDArray[Any]) -> bool:
        """Fill an array; False, with nothing changed, if that destroys what another one took."""
        root = live
        while isinstance(root.base, np.ndarray):
            root = root.base
        group = self._arrays.setdefault(id(root), _Filled())
        shared = group.sharing(live)
        old = live.copy() if shared else None
        live[...] = value  # through every view that the program holds
        if old is not None and not all(_are_same(*pair) for pair in shared):
            live[...] = old
            return False
        group.add(live, value)
        return True

    def keeps_entries(self, live: object) -> bool:
        """Tell whether the container `live` neither gains nor loses an entry."""
        return id(live) in self._held


@singledispatch
def _into(live: Any, value: Any, merging: Merging) -> Any:
    if is_dataclass(live) and type(live).__setattr__ is object.__setattr__:  # it is not frozen
        for each in fields(live):
            new = merging.merged(getattr(live, each.name), getattr(value, each.name))
            setattr(live, each.name, new)
        return live
    return value


@_into.register
def _(live: MutableMapping, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    content = {
        key: merging.merged(live[key], new) if key in live else new for key, new in value.items()
    }
    if merging.keeps_entries(live):
        # A lenient load leaves alone what has no partner.
        live.update({key: new for key, new in content.items() if key in live})
        return live
    live.clear()  # and not only updated: keys that were added since must go, and the order counts
    live.update(content)
    return live


@_into.register
def _(live: defaultdict, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    if isinstance(value, defaultdict):
        live.default_factory = value.default_factory
    return _into.dispatch(MutableMapping)(live, value, merging)


@_into.register
def _(live: deque, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    if live.maxlen != value.maxlen:
        return value  # it cannot be changed
    return _into.dispatch(MutableSequence)(live, value, merging)


@_into.register
def _(live: bytearray | array, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    if isinstance(live, array) and live.typecode != value.typecode:
        return value
    live[:] = value
    return live


@_into.register
def _(live: Namespace | SimpleNamespace, value: Any, merging: Merging) -> Any:
    merging.merged(vars(live), vars(value))
    return live


@_into.register
def _(live: BytesIO, value: Any, merging: Merging) -> Any:
    live.seek(0)
    live.truncate()
    live.write(value.getbuffer())
    live.seek(value.tell())
    return live


@_into.register
def _(live: MutableSequence, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    content = [
        merging.merged(live[i], new) if i < len(live) else new for i, new in enumerate(value)
    ]
    if merging.keeps_entries(live):
        content = [*content[: len(live)], *list(live)[len(content) :]]
    live.clear()
    live.extend(content)
    return live


@_into.register
def _(live: MutableSet, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    live.clear()
    live |= value
    return live


@_into.register
def _(live: tuple, value: Any, merging: Merging) -> Any:  # type: ignore[type-arg]
    if len(live) != len(value):
        return value
    content = list(map(merging.merged, live, value))
    if all(new is old for new, old in zip(content, live, strict=True)):
        return live
    # A named tuple takes its fields one by one.
    return live._make(content) if hasattr(live, "_make") else type(live)(content)


@_into.register
def _(live: np.ndarray, value: Any, merging: Merging) -> Any:
    if live.shape != value.shape or live.dtype != value.dtype or not live.flags.writeable:
        return value
    if not is_apart(live.shape, live.strides, live.itemsize):
        return value  # of elements that are one memory the last would be written to all
    return live if merging.filled(live, value) else value


def _are_same(one: Any, other: Any) -> bool:
    """Tell whether two stored values are the same to the last bit."""
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    try:
        one, other = (
            encode(each, path="value", tensors=tensors, aside=False)
            for each, tensors in zip((one, other), found, strict=True)
        )
    except UsageError:  # a type that is only read: apart they are right in any case
        return False
    return one == other and all(
        _same_memory(first, second)
        for first, second in zip(found[0].values(), found[1].values(), strict=True)
    )


@dataclass
class _Filled:
    """Arrays over one memory that have taken values.

    Attributes:
        pairs: each with its value.
        start: the address of the first byte of them all.
        stop: that behind the last one.
    """

    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    start: int = 0
    stop: int = 0

    def sharing(self, live: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Return those that may have bytes in common with `live`."""
        start, stop = _extent(live)
        if not self.pairs or stop <= self.start or self.stop <= start:
            return []  # thousands of rows, one after another, are not compared with each other
        return [pair for pair in self.pairs if np.may_share_memory(live, pair[0])]

    def add(self, live: NDArray[Any], value: NDArray[Any]) -> None:
        """Note that `live` has taken `value`."""
        start, stop = _extent(live)
        self.start = min(self.start, start) if self.pairs else start
        self.stop = max(self.stop, stop)
        self.pairs.append((live, value))


def _extent(array: NDArray[Any]) -> tuple[int, int]:
    """Return the address of the first byte of `array`, and that behind its last one."""
    start: int = array.__array_interface__["data"][0]
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    if not array.size:
        return start, start
    low, high = sum(min(0, each) for each in reach), sum(max(0, each) for each in reach)
    return start + low, start + high + array.itemsize


def _into_tensor(live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if is_wrapped(live) and is_wrapped(value):
        old, new = pieces(live, ""), pieces(value, "")
        fits = old.keys() == new.keys() and type(local_of(live)) is type(local_of(value))
        # With the tensors filled it is what was stored, if all fit; else it is another one.
        kept = fits and all(_into_tensor(old[key], new[key]) is old[key] for key in old)
        return live if kept else value
    # Of one that is several, `copy_` would write the whole to each of them, or fail.
    if is_wrapped(live) or is_wrapped(value):
        return value
    if live.is_meta or live.shape != value.shape or live.dtype != value.dtype:
        return value
    if not _same_memory(live, value):
        with torch.no_grad():
            live.copy_(value)
    return live


def _same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    if isinstance(first, DTensor) and isinstance(second, DTensor):
        # What a load filled is the live tensor without its gradient: it has its layout too.
        return _same_memory(first.to_local(), second.to_local())
    return first.data_ptr() == second.data_ptr() and first.stride() == second.stride()


# Whether somebody else holds the memory of a tensor that lies in a plain value.


# Further in nobody puts a state dict.
_DEEPEST = 8


def is_held(tensor: torch.Tensor) -> bool:
    """Tell whether another tensor has the memory of `tensor`, or a module or optimizer may hold it.

    A state dict is made of such tensors: if a load put others into the dict, the model would keep
    its old weights. One that lies in the dict alone can be exchanged there.
    """
    if isinstance(tensor, (nn.Parameter, DTensor)) or tensor.requires_grad:
        return True
    if tensor.is_meta or tensor.layout is not torch.strided:
        return False
    try:
        storage = tensor.untyped_storage()
        count = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001
    except (AttributeError, RuntimeError, NotImplementedError):
        return True  # who cannot tell does not exchange it
    # The tensor itself, `storage` here, and what the tensor is a view of.
    own = 3 if tensor._base is not None else 2  # noqa: SLF001
    return count > own


def is_of_module(value: object) -> bool:
    """Tell whether `value` is what `state_dict` of a module returned: torch marks these."""
    return isinstance(value, Mapping) and hasattr(value, "_metadata")


class Borrowed:
    """The tensors in `value` that are those of modules, of which it holds state dicts.

    Such a dict shows what the module has as long as that keeps its tensors. One that was moved to
    another device since, or gives a buffer a new tensor in its forward pass, goes on without it.
    """

    def __init__(self, value: object) -> None:
        self._found = [
            (each, key, id(tensor))
            for each in _state_dicts(value, 0)
            for key, tensor in each.items()
            if isinstance(tensor, torch.Tensor) and tensor.numel() and is_held(tensor)
        ]

    def stale(self) -> str | None:
        """Return the name of a tensor that only the dict has any more; None if there is none."""
        for each, key, identity in self._found:
            tensor = each.get(key)
            # One that was exchanged in the dict was so on purpose.
            if id(tensor) == identity and isinstance(tensor, torch.Tensor) and not is_held(tensor):
                return str(key)
        return None


def _state_dicts(value: object, depth: int) -> Iterator[Mapping[Any, Any]]:
    if is_of_module(value):
        assert isinstance(value, Mapping)
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and depth < _DEEPEST:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _state_dicts(item, depth + 1)
