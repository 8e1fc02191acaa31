"""What a load did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The outcome of a load, on this rank.

    Attributes:
        url: where the run is.
        step: the checkpoint that was loaded.
        save_id: the attempt that wrote it.
        parts: the parts that were restored.
        tensors: how many tensors were filled on this rank.
        nbytes_read: bytes read from storage by this rank, manifest and index excluded.
        seconds: how long it took on this rank.
        saved_world_size: ranks at the save.
        world_size: ranks now.
        refused: newer checkpoints that were passed over, each with the reason.
    """

    url: str
    step: int
    save_id: str
    parts: tuple[str, ...]
    tensors: int
    nbytes_read: int
    seconds: float
    saved_world_size: int
    world_size: int
    refused: Mapping[int, str] = field(default_factory=dict)
