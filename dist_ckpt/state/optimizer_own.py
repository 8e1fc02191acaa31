"""What an optimizer tells beside torch's form: counters, schedules, weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.state.layout import empty_beside
from dist_ckpt.state.objects import decode, encode, references
from dist_ckpt.state.optimizer_content import Capture, Notes, tensor_notes
from dist_ckpt.state.optimizer_live import Reading
from dist_ckpt.state.part import Stored, Targets

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
