"""How far a training run has come, as one typed part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from operator import index
from typing import Any, SupportsIndex

from dist_ckpt.errors import IncompatibleError


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
        """Count on."""
        # Counts come from numpy and torch, and would stay of their types.
        self.step += index(steps)
        self.epoch += index(epochs)
        self.samples += index(samples)
        self.tokens += index(tokens)

    def state_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {name: index(count) for name, count in asdict(self).items()}

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
        known = {field.name for field in fields(self)}
        for name, count in state_dict.items():
            if name not in known or type(count) is not int or count < 0:
                raise IncompatibleError(f"no count of a Progress: {name!r} = {count!r}")
