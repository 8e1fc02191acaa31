"""Reading small tensors before anything is decided, because the decision depends on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_ckpt.loading.reading import ReadOptions, read_targets
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.options import TIMEOUT_SECONDS
from dist_ckpt.planning.describe import Held, LocalBox
from dist_ckpt.ranks.rounds import Deadline, SoloCoordinator, Topic
from dist_ckpt.repository.source import Source
from dist_ckpt.state.layout import dtype_of


def peek(source: Source, numbers: Sequence[int]) -> list[torch.Tensor]:
    """Return stored tensors, whole, on the CPU; each rank reads for itself.

    Raises:
        IntegrityError: their bytes are damaged or missing.
    """
    wanted = [_wanted(source, number) for number in numbers]
    read_targets(
        source,
        wanted,
        ReadOptions(exchange="never"),
        coordinator=SoloCoordinator(),
        topic=Topic("peek", "look at small tensors"),
        deadline=Deadline.after(TIMEOUT_SECONDS),
    )
    return [each.local.memory for each in wanted]


def _wanted(source: Source, number: int) -> Wanted:
    entry = source.tensors[number]
    memory = torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
    start = (0,) * len(entry.shape)
    held = Held(entry.part, entry.name, entry.dtype, entry.shape, start, entry.shape)
    return Wanted(number, LocalBox(held, memory), memory.dtype)
