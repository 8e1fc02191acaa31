"""Loading named tensors into a plain value: a state dict takes what a module, or DCP, has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_ckpt.state.layout import empty_beside, memory_of
from dist_ckpt.state.names import partners
from dist_ckpt.state.objects import decode, fillable, references
from dist_ckpt.state.part import Stored, Targets, TensorSpec
from dist_ckpt.state.wrapped import alias_of, is_wrapped

_PREFIX = "value"


@dataclass(frozen=True, slots=True)
class ByNames:
    """How the names of a plain value and those of a checkpoint fit.

    Attributes:
        targets: where the stored bytes go.
        stored: the content of the checkpoint.
        found: the stored name of each live one.
        places: the container and the key of each leaf that can be replaced, by live name.
        path: what the value is called, for messages.
    """

    targets: Targets
    stored: Stored
    found: Mapping[str, str]
    places: Mapping[str, tuple[Any, Any]]
    path: str

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put what was read into the containers; tensors that were filled in place stay."""
        for name, partner in self.found.items():
            if name not in self.places:
                continue
            container, key = self.places[name]
            live = container[key]
            if partner in self.stored.objects:
                data = self.stored.objects[partner]
                container[key] = decode(data, tensors=tensors, path=f"{self.path}.{name}")
            elif partner in tensors and (not isinstance(live, torch.Tensor) or live.is_meta):
                container[key] = tensors[partner]


def by_names(value: object, stored: Stored, path: str) -> ByNames | None:
    """Find where named tensors and objects go in `value`; None if it is no container.

    Args:
        value: the live value; its names are the keys and list positions, joined by dots.
        stored: what there is.
        path: what the value is called, for messages.

    Raises:
        UsageError: the value holds something that cannot be stored.
        IntegrityError: a stored object is malformed.
        IncompatibleError: a stored object cannot be made in this program.
    """
    if not isinstance(value, (dict, list)):
        return None
    live = {
        name.removeprefix(f"{_PREFIX}."): tensor
        for name, tensor in fillable(value, path=path, prefix=_PREFIX).items()
    }
    places = {
        name: (container, key)
        for name, container, key in _leaves(value, ())
        if not is_wrapped(container[key])  # which is filled by what it is made of
    }
    names = dict.fromkeys([*places, *live])
    known = stored.tensors.keys() | stored.objects.keys()
    found = partners(names, known, is_foreign=stored.is_foreign)
    targets = Targets()
    used: set[str] = set()
    for name in names:
        partner = found.get(name)
        if partner is None or (name in live and partner not in stored.tensors):
            targets.missing.append(name)
        elif partner in stored.tensors:
            spec = stored.tensors[partner]
            targets.tensors[partner] = alias_of(live[name]) if name in live else _fresh(spec)
            if name in live and (rule := stored.resize(partner)) is not None:
                targets.resized[partner] = rule
            used.add(partner)
        else:
            data = stored.objects[partner]
            inner = references(data, path=f"{path}.{partner}")
            if not inner:  # so that nothing is changed when it cannot be made
                decode(data, tensors={}, path=f"{path}.{partner}")
            targets.tensors.update({each: _fresh(stored.tensors[each]) for each in inner})
            used.update((partner, *inner))
    # A name whose memory is filled under another one is not missing.
    filled = {memory_of(live[name]) for name in found if name in live}
    targets.missing[:] = [
        name for name in targets.missing if name not in live or memory_of(live[name]) not in filled
    ]
    targets.unexpected.extend(sorted((stored.tensors.keys() | stored.objects.keys()) - used))
    return ByNames(targets, stored, found, places, path)


def _leaves(value: Any, steps: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the container and the key of all that is no dict and no list itself."""
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, item in items:
        name = (*steps, str(key))
        if isinstance(item, (dict, list)):
            yield from _leaves(item, name)
        elif not isinstance(item, tuple):  # which cannot take another member
            yield ".".join(name), value, key


def _fresh(spec: TensorSpec) -> torch.Tensor:
    return empty_beside(torch.empty(0), spec)


def as_live(value: Any, live: Any) -> Any:
    """Return `value`, which DCP took apart, with the keys and the tuples that `live` has.

    DCP makes texts of keys and lists of tuples, and does not say what they were.
    """
    if isinstance(value, list):
        if not (isinstance(live, (list, tuple)) and len(live) == len(value)):
            return value
        items = [as_live(item, other) for item, other in zip(value, live, strict=True)]
        return tuple(items) if type(live) is tuple else items
    if type(value) is not dict or not isinstance(live, Mapping):
        return value
    keys = {str(key): key for key in live}
    return {
        keys.get(key, key): as_live(item, live.get(keys.get(key, key)))
        for key, item in value.items()
    }
