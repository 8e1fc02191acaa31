"""How a training begins, as its caller says it: plain data, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_ckpt.storage.resolve import Place

Named = Literal["newest", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a training goes on from.

    Attributes:
        which: the newest checkpoint of the run, its best one, or none: a beginning.
        step: exactly this one instead.
        place: from elsewhere instead.
        discard_newer: whether what the run has beyond that is given up.
        must_exist: whether a run without a checkpoint is an error.
        new_run: what asks for a run without a checkpoint, for the message; "" where nothing does.
        weights: where the model comes from when the run has no checkpoint; None for nowhere.
        reset_optimizer: whether optimizer and scheduler stay as the script made them.
    """

    which: Named = "newest"
    step: int | None = None
    place: Place | None = None
    discard_newer: bool = False
    must_exist: bool = False
    new_run: str = ""
    weights: str | None = None
    reset_optimizer: bool = False
