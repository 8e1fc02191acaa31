"""Which checkpoints a job found damaged and went past: the one place that knows."""

from __future__ import annotations

import threading
from collections.abc import Mapping


class PassedOver:
    """The damaged checkpoints of one job, from the restore that passed them over on.

    Each stays in it until its step is saved anew, or restored because it is whole after all:
    another restore in between, of an older step or of the best one, changes nothing about damage.
    They count for no policy and are nobody's best; only they may be saved again; nothing but such
    a save deletes them. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced and never changed, so that whoever looks at it needs no lock.
        self._manifests: Mapping[int, bytes | None] = {}

    @property
    def steps(self) -> frozenset[int]:
        """The steps that were passed over."""
        return frozenset(self._manifests)

    def manifest(self, step: int) -> bytes | None:
        """Return the manifest with which `step` was found damaged; None where that is not known.

        Rank 0 knows it. It tells this very checkpoint from one that took its place since.
        """
        return self._manifests.get(step)

    def add(self, manifests: Mapping[int, bytes | None]) -> None:
        """Take note of steps, each with its manifest as it was found."""
        with self._lock:
            self._manifests = {**self._manifests, **manifests}

    def discard(self, step: int) -> None:
        """Forget `step`: what is there now is whole."""
        with self._lock:
            self._manifests = {old: m for old, m in self._manifests.items() if old != step}
