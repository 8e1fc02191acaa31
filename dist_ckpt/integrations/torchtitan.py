"""torchtitan: a checkpoint manager for its trainer, chosen by the config, without a fork.

```python
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from dist_ckpt.integrations.torchtitan import DistCkptManager


def llama3_in_a_run():
    config = llama3_debugmodel()
    config.checkpoint = DistCkptManager.Config(
        enable=True, folder="s3://bucket/run-17", interval=500
    )
    return config
```

In a module called `config_registry` of yours, that function is what `--config` names. Needs
`torchtitan`; loaded by nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchtitan.components.checkpointer import BaseCheckpointManager, CheckpointManager
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.tools import filesystem

from dist_ckpt import keep
from dist_ckpt.checkpointer import Checkpointer
from dist_ckpt.errors import UsageError
from dist_ckpt.functional import load
from dist_ckpt.integrations.begun import told_by_its_parts
from dist_ckpt.integrations.versions import warn_if_untested
from dist_ckpt.options import TIMEOUT_SECONDS
from dist_ckpt.repository.repository import Repository
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Captured, Part, Stored, Targets
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.resolve import resolve

TESTED = "0.3.0"
"""The release of torchtitan that this was tried with."""

_log = logging.getLogger("dist_ckpt")


class ModelChunks:
    """Several pieces of one model, as interleaved pipelines have them, as one part.

    Each name is in one of them, so together they have the names of the model that is whole.

    Args:
        modules: the pieces of this rank.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._wrapper = ModelWrapper(list(modules))

    def capture(self) -> Captured:
        """Return the tensors of all pieces."""
        return self._part().capture()

    def targets(self, stored: Stored) -> Targets:
        """Return the tensors of all pieces that are stored."""
        return self._part().targets(stored)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let each piece take what was filled, for those whose state dicts are copies."""
        self._wrapper.load_state_dict(self._wrapper.state_dict())

    def _part(self) -> TensorsPart:
        return TensorsPart(self._wrapper.state_dict(), name="model")


def merged_loaders(saved: Sequence[Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return what loaders of all ranks said, each under its own key, for another number of ranks.

    torchtitan itself refuses another number of data-parallel ranks.
    """
    return {key: value for each in saved for key, value in each.items()}


class DistCkptManager(BaseCheckpointManager):
    """Saves the training of torchtitan's trainer into a run, in the background.

    All of it is in each checkpoint. So are the random number generators of every rank, but after a
    restore torchtitan makes the iterator of its loader, which draws a number. A folder in which
    torchtitan itself has saved is read by torchtitan, once.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """The options of torchtitan, and ours.

        Attributes:
            last_save_model_only: torchtitan's, which is refused: the last checkpoint has
                everything, and `dist-ckpt export` writes the model alone.
            staging: see `dist_ckpt.options.SaveOptions`.
            discard_newer: whether `load_step` may give up what is newer; else it is refused to go
                on from there.
            timeout_seconds: after this long a save or a restore fails on every rank.
        """

        last_save_model_only: bool = False
        staging: Literal["blocking", "overlapped"] = "blocking"
        discard_newer: bool = False
        timeout_seconds: float = TIMEOUT_SECONDS

        def __post_init__(self) -> None:
            # Not `super()`: with slots the class is made anew, and that would mean the first one.
            BaseCheckpointManager.Config.__post_init__(self)
            if self.last_save_model_only or self.last_save_in_hf:
                raise ValueError(
                    "last_save_model_only and last_save_in_hf are no options here: the last "
                    "checkpoint has everything, and `dist-ckpt export RUN OUT` (or "
                    "`--format hf`) writes the model alone, in any dtype"
                )

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        """See `BaseCheckpointManager`; `config.build` calls this."""
        warn_if_untested("torchtitan", first=TESTED, last=TESTED)
        self.enable = config.enable
        self.save_future = None
        if not self.enable:
            return
        self.folder = filesystem.join(base_folder, config.folder)
        self._config = config
        # For torchtitan's own manager, should it have saved here before.
        self._theirs = {
            "dataloader": dataloader,
            "model_parts": model_parts,
            "optimizers": optimizers,
            "lr_schedulers": lr_schedulers,
            "states": dict(states),
            "sd_adapter": sd_adapter,
            "base_folder": base_folder,
        }
        parts: dict[str, Any] = {**states, "lr_scheduler": lr_schedulers}
        if isinstance(dataloader, DataLoader):
            # Each rank has a place of its own in the data.
            parts["dataloader"] = PerRank(dataloader, reshard=merged_loaders)
        elif dataloader is not None:
            parts["dataloader"] = dataloader
        named = [ModelPart(each, name="model") for each in model_parts]
        model: Part = named[0] if len(named) == 1 else ModelChunks(model_parts)
        # Not the container: its state dict makes an optimizer step that nobody asked for.
        live = list(optimizers)
        optimizer = OptimizerPart(live[0] if len(live) == 1 else live, models=named)
        self._state = TrainState(model=model, optimizer=optimizer, **parts)
        self._ckpt = Checkpointer(
            self.folder,
            self._state,
            keep=keep.latest(config.keep_latest_k) if config.keep_latest_k else None,
            staging=config.staging,
            timeout_seconds=config.timeout_seconds,
        )

    def _load(self, step: int = -1) -> bool:
        """Restore `step`, or for -1 the newest checkpoint that is whole; see `load`.

        Of step 0, which is a seed checkpoint, the model alone.

        Raises:
            CheckpointError: see `Checkpointer.restore`.
        """
        there = Repository(resolve(self.folder)).candidates()
        if not there:
            return self._load_initial(step)
        left_out = set(self._config.exclude_from_loading)
        if unknown := left_out - set(self._state):
            raise UsageError(
                f"exclude_from_loading={sorted(unknown)} are no parts: {', '.join(self._state)}"
            )
        # Step 0 is a seed, made by one process: its optimizer and its loader are nobody's.
        seed = (there[0] if step == -1 else step) == 0
        asked = None if step == -1 else step
        with told_by_its_parts(self.folder, asked, own="train_state", trainer="torchtitan"):
            self._ckpt.restore(
                step=asked,
                # Sorted, as all ranks have to ask for the same.
                only=["model"] if seed else sorted(set(self._state) - left_out),
                discard_newer=self._config.discard_newer,
            )
        return True

    def _load_initial(self, step: int) -> bool:
        """Begin the run from `initial_load_path`, or from what torchtitan itself saved here."""
        place = self._config.initial_load_path
        if step == -1 and place and Repository(resolve(place)).candidates():
            alone = ["model"] if self._config.initial_load_model_only else ["*"]
            load(self._state, place, only=alone, timeout_seconds=self._config.timeout_seconds)
            return True
        said = {e.name: getattr(self._config, e.name) for e in fields(BaseCheckpointManager.Config)}
        # Nothing that torchtitan saved is deleted by it.
        theirs = CheckpointManager.Config(**{**said, "keep_latest_k": 0})
        manager = theirs.build(**self._theirs)
        try:
            found: bool = manager.load(step)
        finally:
            manager.close()
        if found:
            _log.warning(
                "%s was written by torchtitan itself and is read by torchtitan, this once: the "
                "next save goes into a run",
                place or self.folder,
            )
        return found

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """Begin to save if that is due; see `save`.

        Raises:
            CheckpointError: see `Checkpointer.save`.
        """
        config = self._config
        first = curr_step == 1 and config.enable_first_step_checkpoint
        due = first or last_step or curr_step % config.interval == 0
        if config.load_only or not due:
            return False
        self._ckpt.save(curr_step)
        return True

    def _maybe_wait_for_staging(self) -> None:
        """Do nothing: what is copied while training goes on is waited for by the optimizer."""

    def _wait_for_saving(self) -> None:
        self._ckpt.wait()

    def _close(self) -> None:
        """Finish what is in flight.

        Raises:
            CheckpointError: a save failed.
        """
        # There is none where it is switched off, or where `__init__` failed.
        if "_ckpt" in vars(self):
            self._ckpt.close()
