"""An interrupt where a function begins, which is where Python looks for signals.

That is so short a moment that random signals find a certain one once in thousands of rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def is_interrupted(number: int, work: Callable[[], object]) -> bool:
    """Interrupt `work` where its so manieth function begins; return whether it had so many."""
    left = number

    def at_call(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        sys.settrace(at_call)
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left <= 0
