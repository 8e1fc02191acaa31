"""The state of a training that Hugging Face Accelerate prepared, as a `TrainState`.

```python
import torch
from accelerate import Accelerator

from dist_ckpt import Checkpointer
from dist_ckpt.integrations.accelerate import state_of

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
with Checkpointer("runs/17", state_of(accelerator), every_steps=500) as ckpt:
    for step in range(ckpt.restore() + 1, 501):
        accelerator.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step(step)
```
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType

from dist_ckpt.errors import UsageError
from dist_ckpt.integrations.versions import warn_if_untested
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState

__all__ = ["state_of"]

# There the framework below holds the state, in shapes of its own.
_ELSEWHERE = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)

_log = logging.getLogger("dist_ckpt")


def state_of(accelerator: Accelerator, *, dataloaders: bool = True, **parts: object) -> TrainState:
    """Return all that `accelerator.save_state` would save, and the random state of every rank.

    Call it after `prepare` and `register_for_checkpointing`: what they were given until then is in
    it. The parts are `model`, `optimizer`, `scheduler`, `scaler`, `dataloader` and `custom` (what
    was registered), further ones of a kind `model_1` and so on, and `accelerate`, which counts the
    batches of a gradient accumulation.

    Where a dataloader stands is kept per rank, and only of those that are stateful
    (`DataLoaderConfiguration(use_stateful_dataloader=True)`; a shuffled one needs
    `use_seedable_sampler=True` to shuffle the same again). Where none is, that is said. As it goes
    on, a loader draws one number from torch's generator once more.

    Args:
        accelerator: what prepared the training: for one process, DDP or FSDP2.
        dataloaders: whether where they stand is a part; False for who skips batches itself.
        **parts: further parts, or others in the place of these, and the keywords of `TrainState`:
            `trainable_only=True` for adapters, `rng=None`.

    Raises:
        UsageError: DeepSpeed, Megatron-LM or XLA hold the state, or a part cannot be one.
    """
    found: dict[str, Any] = {**_parts_of(accelerator)}
    if dataloaders:
        found |= _loaders_of(accelerator)
    return TrainState(**{**found, **parts})


def _parts_of(accelerator: Accelerator) -> Mapping[str, object]:
    warn_if_untested("accelerate", first="1.15", last="1.15")
    if accelerator.distributed_type in _ELSEWHERE:
        raise UsageError(
            f"Accelerate runs on {accelerator.distributed_type.value}, which keeps models and "
            "optimizers in a form of its own: train with DDP or FSDP2 (fsdp_version=2)"
        )
    # Accelerate has no public name for what it prepared; `save_state` reads these very lists.
    prepared = vars(accelerator)
    scaler = accelerator.scaler
    return {
        **_numbered("model", prepared["_models"]),
        **_numbered("optimizer", [_inner(each) for each in prepared["_optimizers"]]),
        **_numbered("scheduler", [_inner(each) for each in prepared["_schedulers"]]),
        **_numbered("custom", prepared["_custom_objects"]),
        # One that is switched off has no state.
        **({"scaler": scaler} if scaler is not None and scaler.is_enabled() else {}),
        "accelerate": _Batches(accelerator),
    }


def _loaders_of(accelerator: Accelerator) -> Mapping[str, object]:
    loaders = vars(accelerator)["_dataloaders"]
    stateful = [each for each in loaders if getattr(each, "use_stateful_dataloader", False)]
    if loaders and not stateful:
        _log.warning(
            "none of the %d dataloaders of this Accelerator keeps where it stands, so a resumed "
            "run begins its epoch with the first batch: prepare them with "
            "DataLoaderConfiguration(use_stateful_dataloader=True), or skip batches yourself and "
            "call state_of(accelerator, dataloaders=False)",
            len(loaders),
        )
    return _numbered("dataloader", [PerRank(_Position(each)) for each in stateful])


def _numbered(kind: str, found: Sequence[object]) -> dict[str, object]:
    """Return parts as Accelerate calls its files: `model`, then `model_1`."""
    return {kind if number == 0 else f"{kind}_{number}": each for number, each in enumerate(found)}


def _inner(wrapper: object) -> object:
    """Return what Accelerate wrapped: a part goes by what that is."""
    if isinstance(wrapper, AcceleratedOptimizer):
        return wrapper.optimizer
    return wrapper.scheduler if isinstance(wrapper, AcceleratedScheduler) else wrapper


class _Batches:
    """How many batches `accelerator.accumulate` has counted."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"step": self._accelerator.step}

    def load_state_dict(self, state_dict: Mapping[str, int], /) -> None:
        """Go on from it."""
        self._accelerator.step = state_dict["step"]


class _Position:
    """Where a dataloader stands, which Accelerate forgets from a restore to the next batch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as of the last batch."""
        found: dict[str, Any] = self._loader.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on from it; a save before the next batch has it again."""
        self._loader.load_state_dict(state_dict)
        # `state_dict` of the loader returns this very dict until a batch is drawn.
        self._loader.dl_state_dict = deepcopy(state_dict)
