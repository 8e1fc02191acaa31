"""How a training begins, as its caller says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dist_ckpt.errors import UsageError

if TYPE_CHECKING:  # flags are read without torch
    from dist_ckpt.ranks.job import Place

Named = Literal["newest", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a training goes on from.

    Attributes:
        which: the newest checkpoint of the run, its best one, or none: a beginning.
        step: exactly this one instead.
        place: from elsewhere instead.
        discard_newer: whether what the run has beyond that is given up.
        must_exist: whether a run without a checkpoint is an error.
        new_run: what asks for a run without a checkpoint, for the message; "" where nothing does.
        weights: where the model comes from when the run has no checkpoint; None for nowhere.
        reset_optimizer: whether optimizer and scheduler stay as the script made them.

    Raises:
        UsageError: these contradict each other.
    """

    which: Named = "newest"
    step: int | None = None
    place: Place | None = None
    discard_newer: bool = False
    must_exist: bool = False
    new_run: str = ""
    weights: str | None = None
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        exact = self.step is not None or self.place is not None
        named = self.which in ("newest", "best", "none")
        if not named or (self.which != "newest" and exact):
            raise UsageError(
                "restore takes 'newest' or 'best' or 'none', or one of step= and url=, not "
                f"{self.which!r}, step={self.step!r}, url={self.place!r}"
            )
        if not isinstance(self.discard_newer, bool):
            raise UsageError(f"discard_newer is True or False, not {self.discard_newer!r}")
        if self.discard_newer and self.which == "newest" and not exact:
            raise UsageError(
                "discard_newer=True gives up what is newer than the step that is restored, and "
                "nothing is newer than the newest: name the step, 'best', or 'none'"
            )

    def in_words(self) -> str:
        """Return the call that says this."""
        said = [repr(self.which)] * (self.which != "newest")
        said += [f"step={self.step}"] * (self.step is not None)
        said += ["url=..."] * (self.place is not None)
        said += ["discard_newer=True"] * self.discard_newer
        said += [f"new_run={self.new_run!r}"] * bool(self.new_run)
        return f"restore({', '.join(said)})"

    @property
    def begins(self) -> bool:
        """Whether the run itself begins, whatever the state is filled with."""
        return self.which == "none" or self.place is not None

    @property
    def is_newest(self) -> bool:
        """Whether the newest checkpoint is asked for: nothing in the run is beyond it."""
        return self.which == "newest" and self.step is None and self.place is None
