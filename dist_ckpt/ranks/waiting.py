"""What is said of ranks that others wait for: a word after a while, and more in the error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

_PATIENCE_SECONDS = 30.0

ALIKE = (
    "every rank must make the same calls in the same order; if one rank saves or loads by itself, "
    "give ranks='alone' there, and if some do, their process_group="
)
"""What to do where a rank does not come to a call."""

_log = logging.getLogger("dist_ckpt")


class Waiting:
    """Says once, when the ranks of a call have been waited for for a while, which are missing.

    Ranks come to a save minutes apart where one of them evaluates meanwhile, so this is no error;
    but a call that only one rank makes looks the same until the deadline, which is far.
    """

    def __init__(
        self,
        label: str,
        seconds: float,
        absent: Callable[[], Collection[int]],
        *,
        over: Callable[[], bool] = lambda: False,
        says: bool = True,
    ) -> None:
        """Begin to wait.

        Args:
            label: what for.
            seconds: after which the waiting ends.
            absent: returns who is missing.
            over: tells whether somebody who is waited for will never come.
            says: whether anything is said; only the first round of a call does.
        """
        # Well before the deadline, where that is near.
        self._seconds = min(_PATIENCE_SECONDS, seconds / 4)
        self._at = time.monotonic() + self._seconds
        self._label = label
        self._absent = absent
        self._over = over
        self._said = not says

    def in_vain(self) -> bool:
        """Say it, if it is time and was not said yet; return whether waiting on is of no use."""
        self._say()
        return self._over()

    def _say(self) -> None:
        if self._said or time.monotonic() < self._at:
            return
        self._said = True
        absent = self._absent()
        if absent:
            _log.warning(
                "%s: waiting for rank %s since %.3g s: %s",
                self._label,
                named(absent),
                self._seconds,
                ALIKE,
            )


def named(ranks: Collection[int]) -> str:
    """Return ranks as text, however many: `0, 3-7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join(
        # Of two in a row both are named: nothing is shorter.
        f"{run[0]}{'-' if run[-1] > run[0] + 1 else ', '}{run[-1]}" if len(run) > 1 else str(run[0])
        for run in runs
    )
