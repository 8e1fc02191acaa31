"""Metrics by which something is decided, and that nobody ever tells: they may be misspelt."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Sequence

from dist_ckpt.errors import near
from dist_ckpt.repository.ranking import Criterion

_log = logging.getLogger("dist_ckpt")

# So alike are slips of the pen, and not yet `train/loss` and `val/loss`.
_SLIP = 0.8


class WatchedMetrics:
    """Says once of each metric which is watched, and never told, that it is not.

    A name like it among those that are told is a slip of the pen, and said at once. Else it is said
    after the first epoch whose metrics do not have it, and at the end at the latest: most metrics
    are known at the ends of epochs only.
    """

    def __init__(self, criteria: Sequence[Criterion], url: str) -> None:
        self._missing = {criterion.metric for criterion in criteria}
        self._url = url
        self._seen: set[str] = set()
        self._step: int | None = None

    def tell(self, step: int, names: Collection[str], *, epoch_over: bool) -> None:
        """Take note of the metrics told with `step`."""
        self._step = step
        if not self._missing:
            return  # the usual case, from the first complete telling on
        self._seen |= {name for name in names if isinstance(name, str)}
        self._missing -= self._seen
        slips = {
            name
            for name in self._missing
            if difflib.get_close_matches(name, self._seen, n=1, cutoff=_SLIP)
        }
        self._say(self._missing.copy() if epoch_over and names else slips)

    def close(self) -> None:
        """Say what was never told, if anything was told at all."""
        if self._step is not None:
            self._say(self._missing.copy())

    def _say(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            self._missing.discard(name)
            known = ", ".join(map(repr, sorted(self._seen))) or "none"
            _log.warning(
                "step %d in %s has no metric %r (it has: %s)%s, so nothing can be the best by it, "
                "be kept for it or stop the training: give it as metrics={%r: ...}, or watch "
                "another one",
                self._step,
                self._url,
                name,
                known,
                near(name, self._seen),
                name,
            )
