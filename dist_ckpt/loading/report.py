"""What a load did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The outcome of a load, on this rank; `str` of it is for people.

    Names are `part/name`, as the state has them. What was missing, unexpected or cast is that of
    all ranks together; bytes and seconds are this rank's. A shape that differs, or a dtype that
    may not be cast, never gets this far: it is an `IncompatibleError`.

    Attributes:
        url: where the checkpoint is: its run, or its directory where another program wrote it.
        step: the checkpoint that was loaded; 0 where it has none.
        save_id: the attempt that wrote it, or the format where another program did.
        parts: the parts that were restored.
        loaded: the tensors that this rank filled.
        missing: wanted by the state, not stored; left as they were.
        unexpected: stored, unknown to the state.
        casts: tensors that took another dtype than the stored one; the entry tells both.
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
        for kind in ("missing", "unexpected", "casts"):
            names = getattr(self, kind)
            if names:
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {kind}: {', '.join(names[:_SHOWN])}{rest}")
        lines += [f"  passed over step {step}: {why}" for step, why in self.refused.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"
