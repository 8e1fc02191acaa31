"""Optimizer steps wait for copies in flight: nobody has to remember a call.

One hook for all optimizers of the process, and not one for each optimizer of a state: a wrapper or
a second optimizer may step the same parameters. It is registered once and never removed, because
torch walks its hooks without a lock, and removing one on another thread would break that walk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dist_ckpt.staging.copies import InFlight

_lock = threading.Lock()
_registered = False
# Added to and taken from in single operations, which threads cannot see half done.
_in_flight: dict[int, Sequence[InFlight]] = {}


def hold_steps(copies: Sequence[InFlight]) -> None:
    """Let no optimizer step change anything before `copies` are done."""
    global _registered
    with _lock:
        if not _registered:
            register_optimizer_step_pre_hook(_before_step)
            _registered = True
    _in_flight[id(copies)] = copies


def release_steps(copies: Sequence[InFlight]) -> None:
    """Hold steps no longer for `copies`."""
    _in_flight.pop(id(copies), None)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for copies in tuple(_in_flight.values()):
        for copying in copies:
            copying.before_change()
