"""Learning rate schedulers: stateful, but their `load_state_dict` takes anything."""

from __future__ import annotations

from typing import Any

import torch

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.objects import decode, references
from dist_ckpt.state.part import Stored, Targets
from dist_ckpt.state.values import VALUE, StatefulPart

# Kept by some versions of torch and not by others, with no meaning for the schedule.
_INCIDENTAL = frozenset({"verbose"})


class SchedulerPart(StatefulPart):
    """A scheduler, which refuses the state of one of another kind.

    torch's own schedulers put every entry that they are given into their attributes: the state of a
    cosine would load into a step schedule, which then starts again from its first step.
    """

    def targets(self, stored: Stored) -> Targets:
        """Return as `ValuePart.targets`.

        Raises:
            IncompatibleError: the stored scheduler has other settings than this one, by name.
        """
        targets = super().targets(stored)
        if VALUE in stored.objects:
            data = stored.objects[VALUE]
            blank = {name: torch.empty(0) for name in references(data, path=self.name)}
            self._check_kind(decode(data, tensors=blank, path=self.name))
        return targets

    def _check_kind(self, saved: Any) -> None:
        live = self._read()
        if not isinstance(saved, dict) or not isinstance(live, dict):
            return
        theirs, ours = _settings(saved), _settings(live)
        if theirs != ours:
            raise IncompatibleError(
                f"{self.name}: the checkpoint holds a scheduler with {_listed(theirs - ours)} and "
                f"without {_listed(ours - theirs)}, so it is not of the kind of this "
                f"{type(self._stateful).__qualname__}; build the one that was saved, or leave the "
                "part out to start a new schedule"
            )


def _settings(state: dict[Any, Any]) -> set[str]:
    # Private entries are how a version of torch works, not what the schedule is.
    return {str(key) for key in state if not str(key).startswith("_")} - _INCIDENTAL


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing else"
