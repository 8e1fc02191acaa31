"""What an optimizer keeps of its own, and where that is several tensors behind one face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.groups import View
from dist_ckpt.state.layout import address, dtype_name, empty_beside, is_wrapped, stored_shape
from dist_ckpt.state.optimizer_content import Capture, Notes, tensor_notes, wholes
from dist_ckpt.state.optimizer_live import Reading
from dist_ckpt.state.part import Stored, Targets, TensorSpec
from dist_ckpt.state.rebuilding import Building, difference, how_made, rebuilt
from dist_ckpt.state.spread import pieces

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


# What an optimizer keeps that is several tensors behind one face: filled, or built anew.


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
