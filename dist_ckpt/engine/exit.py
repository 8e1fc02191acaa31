"""The end of the process: a save in flight is finished first, unless somebody insists."""

from __future__ import annotations

import logging
import weakref
from multiprocessing.util import Finalize
from typing import Protocol

from dist_ckpt.engine.handle import SaveHandle

_log = logging.getLogger("dist_ckpt")


class Closing(Protocol):
    """What has to be closed before the process goes."""

    @property
    def in_flight(self) -> SaveHandle | None:
        """The save that is not over yet."""
        ...

    def close(self) -> None:
        """Finish the save in flight."""
        ...

    def give_up(self) -> None:
        """Cancel the save in flight."""
        ...


def close_at_exit(saver: Closing) -> Finalize[None]:
    """Register that a save in flight is finished before this process goes; `cancel` undoes it."""
    reference = weakref.ref(saver)

    def close() -> None:
        alive = reference()
        if alive is None:
            return
        try:
            if alive.in_flight is not None:
                _log.warning(
                    "the process ends when the save of step %d is over; interrupt it to give that "
                    "up",
                    alive.in_flight.step,
                )
            alive.close()
        except KeyboardInterrupt:
            # Asked to end, and asked again: nobody waits for a checkpoint any more. Given up on
            # every rank and not just left, so that none of them waits for this one's report.
            alive.give_up()

    # Not atexit, which the processes of multiprocessing, and so torch's spawn, never come to. In a
    # forked child, which has neither the thread nor the save, it does nothing.
    return Finalize(None, close, exitpriority=10)
