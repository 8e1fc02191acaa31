"""How far a save is: read from any thread, and told as events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dist_ckpt.storage.base import Watch

SavePhase = Literal["staging", "writing", "committing", "done"]
"""What a rank does for a save: copy, then digest and write, then wait for the others, then none."""

_TOLD = 16
"""How often a rank tells how many bytes it has written, besides the changes of phase."""


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far this rank is with its share of a save.

    Attributes:
        phase: what it is doing.
        nbytes_done: how many bytes it has handed to storage; it never falls.
        nbytes_total: how many there are, known once they are staged; equal to `nbytes_done` once
            all of them are stored.
    """

    phase: SavePhase
    nbytes_done: int
    nbytes_total: int


class ProgressMeter:
    """Counts what one rank does for one save.

    Args:
        tell: told at every change of phase, and about 16 times while bytes are written.
    """

    def __init__(self, tell: Callable[[SaveProgress], None]) -> None:
        self._now = SaveProgress("staging", 0, 0)
        self._tell = tell
        self._lock = threading.Lock()
        self._told_phase: SavePhase | None = None
        self._next_told = 0

    @property
    def now(self) -> SaveProgress:
        """How far it is."""
        return self._now  # replaced whole, so it is read without the lock

    def staged(self, nbytes_total: int) -> None:
        """Note how many bytes this rank writes in all, which is known once they are staged."""
        with self._lock:
            self._now = replace(self._now, nbytes_total=nbytes_total)
            self._next_told = self._now.nbytes_done + max(nbytes_total // _TOLD, 1)

    def enter(self, phase: SavePhase) -> None:
        """Note that `phase` has begun, or is going on."""
        with self._lock:
            if phase != self._told_phase:
                self._told_phase = phase
                self._now = replace(self._now, phase=phase)
                self._tell(self._now)

    def file(self, nbytes: int) -> Watch:
        """Return the watch for the put of one file of `nbytes`."""
        seen = 0

        def watch(count: int) -> None:
            nonlocal seen
            with self._lock:
                # What is sent again after a failure is told again, and counted once.
                fresh = min(seen + count, nbytes) - seen
                seen += fresh
                self._advance(fresh)

        return watch

    def _advance(self, nbytes: int) -> None:
        done = self._now.nbytes_done + nbytes
        # What leaves while the rest is still to be staged belongs to a whole of unknown size.
        now = replace(self._now, nbytes_done=done, nbytes_total=max(done, self._now.nbytes_total))
        self._now = now
        if now.phase == "writing" and done >= self._next_told:
            self._next_told = done + max(now.nbytes_total // _TOLD, 1)
            # Under the lock: whoever listens hears no number after a higher one.
            self._tell(now)
