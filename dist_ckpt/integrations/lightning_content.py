"""What a checkpoint of Lightning is made of, as parts of a state, and what is said of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from dist_ckpt.errors import UsageError
from dist_ckpt.integrations.named_run import AskedSave, of_all_ranks, rank_and_size
from dist_ckpt.integrations.names import StepName
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import ValuePart

_log = logging.getLogger("dist_ckpt")

# What Lightning keeps of how a model was built: of any type, and no part of a training.
_DESCRIBING = {"hyper_parameters", "datamodule_hyper_parameters", "hparams_type"}


class AnyContent:
    """A part that is whatever it holds at a save, and takes whatever is stored.

    Lightning hands over dicts of tensors, new ones each time, and wants such back.

    Args:
        name: of the part, for messages.

    Attributes:
        value: what it holds.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.value: Any = None

    def capture(self) -> Captured:
        """Return what it holds now, tensors by their names."""
        value = self.value
        if isinstance(value, Mapping) and all(isinstance(e, torch.Tensor) for e in value.values()):
            return TensorsPart(value, name=self.name).capture()
        return ValuePart(value, name=self.name).capture()

    def targets(self, stored: Stored) -> Targets:
        """Return fresh memory for all that is stored."""
        return Targets(
            {
                name: torch.empty(spec.shape, dtype=dtype_of(spec.dtype))
                for name, spec in stored.tensors.items()
            }
        )

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold what was stored; None where that was no dict, but an optimizer by names."""
        self.value = None if stored.objects else dict(tensors)
        if VALUE in stored.objects:
            self.value = decode(stored.objects[VALUE], tensors=tensors, path=self.name)


class Rest:
    """What Lightning has in a checkpoint beside tensors: loops, callbacks, schedulers.

    Attributes:
        values: by name.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return self.values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take others."""
        self.values = state_dict

    def reshard(self, saved: Sequence[Any], rank: int, world_size: int) -> Any:
        """Return those of rank 0 for a rank that did not save, as Lightning does."""
        return saved[0]

    def of(self, name: StepName | None) -> dict[str, Any]:
        """Return the values of what was loaded by `name`, which may be later than the save."""
        if name is None or not name.values:
            return self.values
        rank, world_size = rank_and_size()
        own = name.values[rank if len(name.values) == world_size else 0]
        values: dict[str, Any] = decode(own.encode(), tensors={}, path="values")
        return values


def optimizers_of(checkpoint: Mapping[str, Any]) -> Any:
    """Return the state of the optimizer, a list of several, None where the model is alone."""
    states = checkpoint.get("optimizer_states")
    return states[0] if states is not None and len(states) == 1 else states


def asked_for(checkpoint: Mapping[str, Any], key: str, *, tensors: Any) -> AskedSave:
    """Return what Lightning asks for when it saves `checkpoint` as `key`.

    Args:
        checkpoint: as a `Trainer` made it.
        key: the name of the file.
        tensors: see `AskedSave`.

    Raises:
        UsageError: it was made by something else.
    """
    if "global_step" not in checkpoint:
        raise UsageError(
            "this is no checkpoint of a Trainer: in a loop of Fabric use "
            "dist_ckpt.Checkpointer, as docs/guides/lightning.md shows"
        )
    return AskedSave(
        step=int(checkpoint["global_step"]),
        tensors=tensors,
        values=_values(checkpoint),
        full="optimizer_states" in checkpoint,
        metrics=_scores(checkpoint, key),
        about={
            "name": "lightning",
            "version": checkpoint.get("pytorch-lightning_version", ""),
            "epoch": checkpoint.get("epoch"),
            "saved_as": key,
        },
    )


def _values(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return all but model and optimizers, and of how they were built what can be stored."""
    apart = ("state_dict", "optimizer_states")
    found = {name: value for name, value in checkpoint.items() if name not in apart}
    lost = []
    for name in _DESCRIBING & found.keys():
        value = found.pop(name)
        said = value if isinstance(value, Mapping) else {"": value}
        kept = {key: each for key, each in said.items() if _can_be_stored(each)}
        lost += [f"{name}.{key}".rstrip(".") for key in said if key not in kept]
        if isinstance(value, Mapping) or kept:
            found[name] = kept if isinstance(value, Mapping) else value
    if lost:
        _tell_lost(", ".join(sorted(lost)))
    return found


def _can_be_stored(value: object) -> bool:
    try:
        encode(value, path="value")
    except UsageError:
        return False
    return True


@cache
def _tell_lost(names: str) -> None:
    _log.warning(
        "%s: of a type that no checkpoint holds, so it is left out. Training goes on without it; "
        "load_from_checkpoint has to be given it",
        names,
    )


def _scores(checkpoint: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return by what a `ModelCheckpoint` chose to save this."""
    found = {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor"):
            scores = {os.path.basename(p): s for p, s in state.get("best_k_models", {}).items()}
            if key in scores:
                found[str(state["monitor"])] = float(scores[key])
    return found


def say_imported(path: object) -> None:
    """Say that Lightning itself wrote `path`, and reads it."""
    _log.warning(
        "%s was written by Lightning itself and is read by Lightning, this once: the next save "
        "goes into a run",
        path,
    )


def read_as_lightning(
    path: str | os.PathLike[str], map_location: Any | None, weights_only: bool | None
) -> dict[str, Any]:
    """Return what Lightning itself wrote, read by Lightning. See `CheckpointIO.load_checkpoint`."""
    how = {} if map_location is None else {"map_location": map_location}
    found: dict[str, Any] = TorchCheckpointIO().load_checkpoint(
        path, weights_only=weights_only, **how
    )
    say_imported(path)
    return found


def refuse_strategy(strategy: object) -> None:
    """Refuse to save what is no tensor of the model's own by its own name.

    Raises:
        UsageError: the strategy flattens parameters, or keeps them in an engine of its own.
    """
    if isinstance(strategy, FSDPStrategy):
        raise UsageError(
            "FSDPStrategy is FSDP1, which flattens parameters until nobody can say which is where: "
            "take DistCkptModelParallelStrategy in its place, and shard in configure_model with "
            "torch.distributed.fsdp.fully_shard, as docs/guides/lightning.md shows"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise UsageError(
            "DeepSpeed keeps model and optimizer in an engine of its own: "
            "docs/guides/other-trainers.md says what can be done"
        )


def refuse_idle_plugin(strategy: Strategy) -> None:
    """Refuse a plugin that is given to a strategy which never asks it to save.

    Raises:
        UsageError: it would be left out without a word.
    """
    plugin = vars(strategy)["_checkpoint_io"]
    if plugin is None or isinstance(plugin, TorchCheckpointIO):
        return
    refuse_strategy(strategy)
    if type(strategy).save_checkpoint is ModelParallelStrategy.save_checkpoint:
        raise UsageError(
            f"{type(strategy).__name__} saves by itself and asks no plugin: take "
            "DistCkptModelParallelStrategy in its place, without a plugin"
        )


class RandomState(Callback):
    """Keeps the random number generators of every rank in the checkpoints, beside `DistCkptIO`.

    The strategies of this module keep them by themselves. At another number of ranks each rank
    gets streams of its own, the same each time.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to begin where the plugin beside it would never be asked to save.

        Raises:
            UsageError: the strategy saves by itself.
        """
        refuse_idle_plugin(trainer.strategy)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator, of every rank."""
        return {"by_rank": of_all_ranks(RngPart().capture().objects)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the generators."""
        saved = state_dict["by_rank"]
        rank, world_size = rank_and_size()
        own = saved[rank if len(saved) == world_size else 0]
        RngPart().restore(Stored({}, own, rank, world_size, len(saved)), {})


class OptimizersIfFull(OptimizerPart):
    """Optimizers that are left out where the model alone is asked for.

    Attributes:
        full: whether they are saved.
    """

    full = True

    def capture(self) -> Captured:
        """Return what they hold, or nothing."""
        return super().capture() if self.full else Captured({}, {})
