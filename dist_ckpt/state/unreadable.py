"""What the values of other programs' checkpoints hold besides plain values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNREADABLE = "unreadable"
"""The tag of what a foreign checkpoint holds and nobody can decode; its payload tells why."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that only a program which executes pickles could read.

    Attributes:
        reason: what is told to whoever wants the value.
    """

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Inline:
    """A tensor that belongs into the encoding of the value that holds it."""

    tensor: torch.Tensor
