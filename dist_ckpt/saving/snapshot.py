"""One rank's state at the moment of a save: live tensors described, Python values encoded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.format import document
from dist_ckpt.format.digest import bytes_digest
from dist_ckpt.planning.describe import Describer, Held, LocalBox
from dist_ckpt.planning.index import Document
from dist_ckpt.saving.messages import Description, ObjectName
from dist_ckpt.saving.versions import Versions
from dist_ckpt.state.groups import options_digest
from dist_ckpt.state.train_state import TrainState

Objects = Mapping[str, Mapping[str, bytes]]
"""Encoded values by part and name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank holds.

    Attributes:
        local: its boxes with the live memory behind them.
        shared: encoded values that are the same on every rank that holds them.
        per_rank: encoded values of this rank alone.
        fingerprint: digest of all that a plan depends on: names, shapes, dtypes, boxes.
        versioned: by part, the names of shared values of which ranks may hold versions.
    """

    local: list[LocalBox]
    shared: Objects
    per_rank: Objects
    fingerprint: str
    versioned: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def held(self) -> list[Held]:
        """The boxes as they are described to others."""
        return [box.held for box in self.local]

    def description(self) -> Description:
        """Return all that the coordinator needs for a plan."""
        digests = {
            part: {name: bytes_digest(data) for name, data in objects.items()}
            for part, objects in self.shared.items()
        }
        versioned = {
            part: {name: options_digest(self.shared[part][name]) for name in names}
            for part, names in self.versioned.items()
        }
        return Description(self.held, digests, versioned)

    def group_digest(self, names: Iterable[ObjectName], versions: Versions | None = None) -> str:
        """Return one digest over encoded values; a missing one changes it too.

        Args:
            names: of the values, as they are stored.
            versions: what this rank calls those that it has under another name.
        """
        found = [self._find(part, name, versions or {}) for part, name in names]
        return bytes_digest(msgspec.msgpack.encode(found))

    def documents(
        self, shared: Iterable[ObjectName], versions: Versions | None = None
    ) -> dict[str, bytes]:
        """Return what this rank writes into its `extra` file, by part.

        Args:
            shared: the shared values that the plan gave to this rank.
            versions: see `group_digest`.
        """
        chosen: dict[str, dict[str, bytes]] = {}
        for part, name in shared:
            data = self._find(part, name, versions or {})
            assert data is not None  # the plan was made of what this rank described
            chosen.setdefault(part, {})[name] = data
        every = chosen | {part: dict(objects) for part, objects in self.per_rank.items()}
        return {part: document.encode(objects) for part, objects in every.items()}

    def _find(self, part: str, name: str, versions: Versions) -> bytes | None:
        return self.shared.get(part, {}).get(versions.get(part, {}).get(name, name))

    def describe_documents(self, documents: Mapping[str, bytes]) -> list[Document]:
        """Return what the coordinator must know of `documents`."""
        return [
            Document(part, part in self.per_rank, len(data), bytes_digest(data))
            for part, data in documents.items()
        ]


def take(state: TrainState, *, world_size: int, describer: Describer | None = None) -> Snapshot:
    """Capture every part of `state`.

    Args:
        state: the live state.
        world_size: how many ranks there are.
        describer: what earlier snapshots of this state found out; None to find out all anew.

    Raises:
        UsageError: the state is empty, something in it cannot be stored (the message names it), or
            a CUDA graph is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        # What is copied now would be copied at each replay, and nothing is copied now.
        raise UsageError(
            "save was called while a CUDA graph is being captured: call it outside of the capture"
        )
    state.check_current()
    captured = {name: part.capture() for name, part in state.parts.items()}
    if not any(part.tensors or part.objects for part in captured.values()):
        raise UsageError("the state is empty: give TrainState at least one part with content")
    describer = describer or Describer()
    local = describer.describe(
        {name: part.tensors for name, part in captured.items()},
        unequal={name: part.unequal for name, part in captured.items()},
        stepped={name: part.stepped for name, part in captured.items()},
    )
    shared = {name: part.objects for name, part in captured.items() if not part.per_rank}
    per_rank = {name: part.objects for name, part in captured.items() if part.per_rank}
    names = [[(part, sorted(objs)) for part, objs in group.items()] for group in (shared, per_rank)]
    boxes = describer.digest([box.held for box in local])
    depends = msgspec.msgpack.encode((boxes, names, world_size))
    versioned = {name: part.versioned for name, part in captured.items() if part.versioned}
    return Snapshot(local, shared, per_rank, bytes_digest(depends), versioned)
