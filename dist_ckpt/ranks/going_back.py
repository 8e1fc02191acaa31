"""Training on from an older step, or from none: what is newer must not be left in the run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_ckpt.errors import ErrorKind, UsageError

_SHOWN = 5
# What counts the restarts of one command: of torchrun, and of a job that Slurm put back in line.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def check_first_start(url: str, newer: Sequence[int]) -> None:
    """Check that this program was not restarted by itself, with the same arguments as before.

    Raises:
        UsageError: it was, and what it is to give up is most likely what it saved itself.
    """
    for name in _RESTARTS:
        count = os.environ.get(name, "")
        if count.isascii() and count.isdecimal() and int(count) > 0:
            raise UsageError(
                f"discard_newer=True in a restart ({name}={count}) would give up step "
                f"{', '.join(map(str, newer[-_SHOWN:]))} in {url}, which the starts before it may "
                "have saved: go back in a start of its own, and then go on with restore() or "
                "--auto-resume"
            )


def left_behind(url: str, origin: int | None, newer: Sequence[int]) -> UsageError:
    """Return the error of a training that would leave newer checkpoints in the run.

    Args:
        url: the run.
        origin: the step it goes on from; -1 for the beginning, None when nobody called `restore`.
        newer: the committed steps above that, ascending.
    """
    listed = ", ".join(map(str, newer[-_SHOWN:]))
    if len(newer) > _SHOWN:
        listed = f"{len(newer) - _SHOWN} others and {listed}"
    there = f"{url} has checkpoints ({listed})"
    if origin is None:
        return UsageError(
            f"{there}, and this training goes on from none of them, because restore() was not "
            "called, or failed: a training from the beginning would replace them. Call restore() "
            "before the first step; to begin anew and give them up, restore('none', "
            "discard_newer=True); to keep both, begin another run",
            kind=ErrorKind.NOT_RESTORED,
        )
    start = "the beginning" if origin < 0 else f"step {origin}"
    return UsageError(
        f"{url} has checkpoints newer than {start} ({listed}), and a restart would go on from step "
        f"{newer[-1]}: to train on from {start} and give them up, restore with discard_newer=True; "
        "to keep both, save into another run; only to look, dist_ckpt.load(state, url, step=...) "
        "takes nothing over, and rollback() restores the best model alone",
        kind=ErrorKind.STEP_BEHIND,
    )
