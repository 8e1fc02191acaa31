"""Work on all checkpoints of a run, of which one that cannot be read keeps no other from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from dist_ckpt.errors import CheckpointError, ErrorKind, NotFound

Left: TypeAlias = dict[int, tuple[str, CheckpointError]]
"""By step what was not done: what is known of the checkpoint, and the error that says why."""


def work_on(
    steps: Iterable[int],
    work: Callable[[int], None],
    *,
    every: bool,
    passed_over: Mapping[type[CheckpointError], str],
) -> Left:
    """Call `work` with each step; return what was passed over.

    What the retention of the job that trains has deleted meanwhile is none that is missing.

    Args:
        steps: which.
        work: what to do.
        every: whether they are all of a run; of one that was named an error is the answer.
        passed_over: by what errors say nothing of the others, what is known then.
    """
    left: Left = {}
    for step in steps:
        try:
            work(step)
        except NotFound as error:
            if not every or error.kind not in (ErrorKind.NO_CHECKPOINT, ErrorKind.NO_RUN):
                raise
        except tuple(passed_over) as error:
            if not every:
                raise
            left[step] = passed_over[type(error)], error
    return left
