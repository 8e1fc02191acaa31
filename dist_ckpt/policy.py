"""When to save: pure values asked with the step."""

from __future__ import annotations

from collections.abc import Callable

from dist_ckpt.errors import UsageError

SavePolicy = Callable[[int], bool]
"""Whether a save is due after a step."""


def every(steps: int | None) -> SavePolicy:
    """Return the policy that saves at every multiple of `steps`, and never for None.

    Raises:
        UsageError: `steps` is not a positive integer.
    """
    if steps is None:
        return lambda step: False
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"every_steps must be a positive integer, not {steps!r}")
    return lambda step: step % steps == 0
