"""How far a load has come, and what an error that ends it says of the state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NoReturn

from dist_ckpt.errors import CheckpointError, NotFound


@dataclass(slots=True)
class LoadProgress:
    """One load on its way.

    Attributes:
        begun: when, on the clock of `time.perf_counter`.
        touched: whether bytes may have reached live tensors.
        lost: how many checkpoints were deleted while they were read.
        asked: the parts that were restored first, some perhaps before another one refused.
        seconds: how long each phase took.
    """

    begun: float = field(default_factory=time.perf_counter)
    touched: bool = False
    lost: int = 0
    asked: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def clock(self, phase: str, since: float) -> None:
        """Count the time since `since` for `phase`."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since

    @property
    def changed(self) -> str:
        """What of the state may have changed, as a sentence; empty for nothing."""
        if self.touched:
            return "Tensors of the state may be partly restored: load again before use"
        if self.asked:
            return f"No tensor was changed; of {', '.join(self.asked)} some may be restored"
        return ""


def tell(
    error: CheckpointError, progress: LoadProgress, cause: CheckpointError | None = None
) -> NoReturn:
    """Raise `error`, with what became of the state where that may have changed.

    Args:
        error: how the load failed.
        progress: how far it was.
        cause: what led to it; None where `error` has a cause of its own.

    Raises:
        CheckpointError: always.
    """
    known = NotFound if isinstance(error, NotFound) else type(error)
    if progress.changed and known.__init__ is not CheckpointError.__init__:
        # A class of the program's own, and only that knows what its constructor takes.
        error.add_note(progress.changed)
    elif progress.changed:
        told = known(f"{error.message}. {progress.changed}", kind=error.kind, ranks=error.ranks)
        raise told from cause or error
    if cause is None:
        raise error  # with the cause that it has
    raise error from cause
