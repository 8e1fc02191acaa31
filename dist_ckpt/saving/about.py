"""What is said of a save besides its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_ckpt.saving.provenance import Origin


@dataclass(frozen=True, slots=True)
class About:
    """Why a save is made, and by what.

    Attributes:
        reason: why now, for people; "" when nobody said.
        epoch: the epoch that ends with the step, None in the middle of one.
        program: what made it; None leaves that out.
        elapsed_seconds: how long the run had trained when the save began.
        told: metrics of which was said already that they differ between ranks.
    """

    reason: str = ""
    epoch: int | None = None
    program: Origin | None = None
    elapsed_seconds: float | None = None
    told: set[str] = field(default_factory=set)

    def origin(self, hosts: Sequence[str]) -> dict[str, Any]:
        """Return what the manifest says of it, given the host of each rank."""
        found: dict[str, Any] = {"hosts": list(dict.fromkeys(hosts))}
        if self.reason:
            found["reason"] = self.reason
        if self.elapsed_seconds is not None:
            found["elapsed_seconds"] = round(self.elapsed_seconds, 3)
        if self.program is not None:
            found |= self.program.describe()
        return found
