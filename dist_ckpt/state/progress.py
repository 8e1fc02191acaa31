"""How far a training run has come, as one typed part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, SupportsIndex

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.format.names import as_integer


@dataclass
class Progress:
    """Counters of a run, saved and restored with the rest of the state.

    ```python
    import dist_ckpt
    import torch

    progress = dist_ckpt.Progress()
    state = dist_ckpt.TrainState(model=torch.nn.Linear(4, 1), progress=progress)
    batch = torch.randn(8, 4)
    progress.add(steps=1, samples=len(batch), tokens=batch.numel())
    ```

    The counts are of the whole job, equal on every rank. A restore changes the object in place.

    Attributes:
        step: training steps done.
        epoch: the epoch that training is in, from 0.
        samples: samples seen by all ranks together.
        tokens: tokens seen by all ranks together.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0

    def add(
        self,
        *,
        steps: SupportsIndex = 0,
        epochs: SupportsIndex = 0,
        samples: SupportsIndex = 0,
        tokens: SupportsIndex = 0,
    ) -> None:
        """Count on.

        Raises:
            UsageError: one of them is no integer from 0; nothing was counted.
        """
        more = {"step": steps, "epoch": epochs, "samples": samples, "tokens": tokens}
        # All of them first. They come from numpy and torch, and would stay of their types.
        counts = {name: _count(name, count) for name, count in more.items()}
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)

    def state_dict(self) -> dict[str, int]:
        """Return the counts by name.

        Raises:
            UsageError: one is no count, which no load would take.
        """
        return {name: _count(name, count) for name, count in asdict(self).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take the counts that `state_dict` returned; a count it does not know stays as it is.

        Raises:
            IncompatibleError: an entry is no count, or of a name that this version does not have.
        """
        self.check_state_dict(state_dict)
        for name, count in state_dict.items():
            setattr(self, name, count)

    def check_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Check that `load_state_dict` would take `state_dict`; changes nothing.

        Raises:
            IncompatibleError: as for `load_state_dict`.
        """
        if not isinstance(state_dict, Mapping):
            raise IncompatibleError(f"no counts of a Progress: {state_dict!r}")
        known = {field.name for field in fields(self)}
        for name, count in state_dict.items():
            if name not in known or type(count) is not int or count < 0:
                raise IncompatibleError(f"no count of a Progress: {name!r} = {count!r}")


def _count(name: str, value: object) -> int:
    number = as_integer(value)
    if number is None or number < 0:
        raise UsageError(f"{name} of a Progress counts in integers from 0, not {value!r}")
    return number
