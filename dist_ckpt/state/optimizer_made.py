"""What an optimizer keeps that is several tensors behind one face: filled, or built anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.state.groups import View
from dist_ckpt.state.layout import address, dtype_name, empty_beside
from dist_ckpt.state.optimizer_content import wholes
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.rebuilding import Building, difference, how_made, rebuilt
from dist_ckpt.state.spread import pieces
from dist_ckpt.state.wrapped import is_wrapped, stored_shape


class Faces:
    """The wrapped tensors that are stored of one optimizer.

    Args:
        view: the live optimizer.
        made: what is noted of each, by stored name.
        part: what it is called, for messages.

    Raises:
        IntegrityError: a note is malformed.
    """

    def __init__(self, view: View, made: Mapping[str, Any], part: str) -> None:
        self._view = view
        self._part = part
        self._faces: dict[str, tuple[Building, list[str]]] = {}
        self._of: dict[str, tuple[str, str]] = {}
        for name, noted in made.items():
            if view.owner(name) is None:
                continue
            building = Building(noted, f"{part}.{name}")
            suffixes = building.suffixes()
            self._faces[name] = building, suffixes
            self._of.update({name + suffix: (name, suffix) for suffix in suffixes})

    def has(self, name: str) -> bool:
        """Tell whether the stored tensor `name` is one of those behind a face."""
        return name in self._of

    def target(
        self, name: str, owner: str, spec: TensorSpec, *, kept: object, in_place: bool
    ) -> torch.Tensor:
        """Return what to fill with a stored inner tensor.

        Args:
            name: the stored one.
            owner: the parameter.
            spec: what is stored.
            kept: the live one, if there is one.
            in_place: whether that may be filled.
        """
        if isinstance(kept, torch.Tensor):
            same = (stored_shape(kept), dtype_name(kept.dtype)) == (spec.shape, spec.dtype)
            # One of another shape or dtype is none that could be cast: it is refused as it is.
            return kept if in_place or not same else empty_beside(kept, spec)
        face, suffix = self._of[name]
        return self._faces[face][0].target(suffix, spec, self._view.parameters[owner])

    def check(self, live: Mapping[str, Any], targets: Mapping[str, torch.Tensor]) -> None:
        """See that each can be put together, while nothing has changed.

        Raises:
            IncompatibleError: one cannot be built, or the live one is of another kind.
        """
        for name, (building, suffixes) in self._faces.items():
            if not all(name + suffix in targets for suffix in suffixes):
                continue
            owner, key = self._owner(name)
            kept = wholes(live.get(owner)).get(key)
            if kept is None:
                building.build({suffix: targets[name + suffix] for suffix in suffixes})
                continue
            problem = difference(how_made(kept), building.noted)
            if problem is not None:
                raise IncompatibleError(
                    f"{self._part}.{name}: stored and kept by this optimizer are {problem}: build "
                    "the optimizer with the options that it was saved with",
                    kind=ErrorKind.STATE_MISMATCH,
                )

    def put_together(self, entries: dict[str, dict[str, Any]], kept: Mapping[str, Any]) -> None:
        """Put wholes in the place of the inner tensors in `entries`, given by parameter.

        Args:
            entries: what was loaded.
            kept: what the optimizer keeps; a whole that was filled where it lies stays itself.
        """
        for name, (building, suffixes) in self._faces.items():
            owner, key = self._owner(name)
            mine = entries.get(owner, {})
            if all(key + suffix in mine for suffix in suffixes):
                inner = {suffix: mine.pop(key + suffix) for suffix in suffixes}
                mine[key] = whole_of(inner, wholes(kept.get(owner)).get(key), building)

    def _owner(self, name: str) -> tuple[str, str]:
        owner = self._view.owner(name)
        assert owner is not None  # `__init__` left out those without one
        return owner


def whole_of(
    inner: Mapping[str, torch.Tensor], kept: torch.Tensor | None, building: Building
) -> torch.Tensor:
    """Return the whole that `inner` are: the live one if they are its memory."""
    if kept is None or not is_wrapped(kept):
        return building.build(inner)
    live = pieces(kept, building.where)
    if live.keys() != inner.keys():
        return building.build(inner)
    if all(address(live[suffix]) == address(tensor) for suffix, tensor in inner.items()):
        return kept
    return rebuilt(kept, inner)
