"""What a load did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from dist_ckpt.errors import CheckpointError, NotFound
from dist_ckpt.repository.source import reason

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The outcome of a load, on this rank; `str` of it is for people.

    Names are `part/name`, as the state has them. What was missing, unexpected, cast or resized is
    that of all ranks together; bytes and seconds are this rank's. A shape that differs and is not
    resized, or a dtype that may not be cast, never gets this far: it is an `IncompatibleError`.

    Attributes:
        url: where the checkpoint is: its run, or its directory where another program wrote it.
        step: the checkpoint that was loaded; 0 where it has none.
        save_id: the attempt that wrote it, or the format where another program did.
        parts: the parts that were restored.
        loaded: the tensors that this rank filled.
        missing: wanted by the state, not stored; left as they were.
        unexpected: stored, unknown to the state.
        casts: tensors that took another dtype than the stored one; the entry tells both.
        resized: tensors of another shape than the stored one, loaded in part; the entry tells both,
            and what became of the rest.
        nbytes_wanted: bytes of the tensors, or of its boxes of them, that this rank holds.
        nbytes_read: bytes read from storage by this rank, manifest and index excluded.
        nbytes_exchanged: bytes received from ranks that read them.
        exchanged: whether ranks read what several want once, and sent it to one another.
        exchange_reason: what that was decided by.
        verified: whether every byte was compared with its digest.
        seconds: how long it took on this rank.
        seconds_by_phase: the same by phase: `choose` the checkpoint, `match` the names, `plan`,
            `read`, `exchange`, and `restore`, which hands the values to the parts.
        saved_world_size: ranks at the save; 0 where the checkpoint does not say.
        world_size: ranks now.
        refused: newer checkpoints that were passed over, each with the reason.
        notes: what else to know, though nothing is wrong: new streams of random numbers, values of
            each rank that were resharded.
    """

    url: str
    step: int
    save_id: str
    parts: tuple[str, ...]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    casts: tuple[str, ...]
    nbytes_wanted: int
    nbytes_read: int
    nbytes_exchanged: int
    exchanged: bool
    exchange_reason: str
    verified: bool
    seconds: float
    seconds_by_phase: Mapping[str, float]
    saved_world_size: int
    world_size: int
    refused: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """How many tensors were filled on this rank."""
        return len(self.loaded)

    def __str__(self) -> str:
        saved = self.saved_world_size or "an unknown number of"
        verified = "verified" if self.verified else "NOT verified"
        phases = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds_by_phase.items())
        head = f"step {self.step} of {self.url} ({self.save_id}), saved by {saved} ranks"
        what = f"{len(self.loaded)} tensors of {', '.join(self.parts) or 'no part'}"
        moved = f"{_size(self.nbytes_read)} read, {_size(self.nbytes_exchanged)} received"
        lines = [
            f"loaded {head}, by {self.world_size} now",
            f"  {what}: {_size(self.nbytes_wanted)}, {verified}",
            f"  {moved} ({self.exchange_reason})",
            f"  {self.seconds:.2f} s: {phases}",
        ]
        for kind in ("missing", "unexpected", "casts", "resized"):
            names = getattr(self, kind)
            if names:
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {kind}: {', '.join(names[:_SHOWN])}{rest}")
        lines += [
            f"  passed over step {step}: {reason(step, self.url, why)}"
            for step, why in self.refused.items()
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


# How far a load has come, and what an error that ends it says of the state.


@dataclass(slots=True)
class LoadProgress:
    """One load on its way.

    Attributes:
        begun: when, on the clock of `time.perf_counter`.
        touched: of which attempt bytes may have reached live tensors; "" for none.
        lost: how many checkpoints were deleted while they were read.
        asked: the parts that were restored first, some perhaps before another one refused.
        seconds: how long each phase took.
    """

    begun: float = field(default_factory=time.perf_counter)
    touched: str = ""
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


def tell_report(
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
