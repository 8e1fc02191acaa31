"""Lightning: a plugin for one process and DDP, and strategies by which every rank saves its share.

```python
from lightning.pytorch import Trainer

from dist_ckpt.integrations.lightning import DistCkptIO

trainer = Trainer(plugins=[DistCkptIO()], max_epochs=3)
```

The folder of a `ModelCheckpoint` is a run, and a `.ckpt` in it the name of one of its steps
(`dist_ckpt.integrations.names`). Needs `lightning`; loaded by nobody else.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from dist_ckpt.errors import UsageError
from dist_ckpt.integrations.named_run import (
    AskedSave,
    NamedRun,
    of_all_ranks,
    random_of,
    rank_and_size,
)
from dist_ckpt.integrations.names import PointedAt, StepName, find, forget_listing, place_and_key
from dist_ckpt.integrations.versions import warn_if_untested
from dist_ckpt.options import TIMEOUT_SECONDS
from dist_ckpt.repository.repository import Repository
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import ValuePart
from dist_ckpt.storage.resolve import resolve

__all__ = [
    "NEWEST",
    "DistCkptDDPStrategy",
    "DistCkptIO",
    "DistCkptModelParallelStrategy",
    "DistCkptSingleDeviceStrategy",
    "DistCkptStrategy",
    "RandomState",
    "as_file",
    "newest_in",
]

Path: TypeAlias = str | os.PathLike[str]

_PARTS = ["model", "optimizer", "lightning"]

TESTED = "2.6"
"""The releases of Lightning that this was tried with."""

NEWEST = "last"
"""How the names begin that mean the newest checkpoint; as `ModelCheckpoint` has it."""


def newest_in(run: Path) -> str | None:
    """Return `run` if it has a checkpoint, and None if it has not: for `fit(ckpt_path=...)`.

    Args:
        run: the folder of the `ModelCheckpoint`, a path or a URL.

    Raises:
        StorageError: it could not be looked at.
    """
    return os.fspath(run) if Repository(resolve(run)).candidates() else None


def as_file(path: Path) -> io.BytesIO:
    """Return a checkpoint as the file that Lightning itself writes, in memory.

    For `MyModule.load_from_checkpoint(as_file(trainer.checkpoint_callback.best_model_path))`, and
    for whoever has no dist_ckpt.

    Args:
        path: what `fit(ckpt_path=...)` takes.

    Raises:
        CheckpointError: see `DistCkptIO.load_checkpoint`.
    """
    file = io.BytesIO()
    torch.save(DistCkptIO().load_checkpoint(path), file)
    file.seek(0)
    return file


class DistCkptIO(CheckpointIO):
    """Saves the checkpoints of a `Trainer` into runs, in the background; for one process and DDP.

    Rank 0 alone saves, as Lightning has it; every rank reads. What is in flight is finished before
    `fit` returns, also by an exception. A checkpoint that Lightning wrote itself is read by
    Lightning.

    Args:
        discard_newer: whether checkpoints may be given up that are newer than the one that
            training goes on from; else training refuses to leave them behind.
        timeout_seconds: after this long a save or a load fails.
    """

    def __init__(
        self, *, discard_newer: bool = False, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        warn_if_untested("lightning", first=TESTED, last=TESTED)
        self._discard_newer = discard_newer
        self._timeout_seconds = timeout_seconds
        self._model = AnyContent("model")
        self._optimizer = AnyContent("optimizer")
        self._rest = Rest()
        self._runs: dict[str, NamedRun] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None
    ) -> None:
        """Begin to save; return when the state may change again.

        Raises:
            UsageError: there are `storage_options`, or a value that no checkpoint can hold.
            CheckpointError: see `Checkpointer.save`; the failure of the save before, too.
        """
        _refuse_options(storage_options)
        place, key = place_and_key(path)
        asked = asked_for(
            checkpoint, key, tensors=(checkpoint["state_dict"], optimizers_of(checkpoint))
        )

        # A function, as the run that is opened for the save may restore into these very parts.
        def put() -> None:
            self._model.value = checkpoint["state_dict"]
            self._optimizer.value = optimizers_of(checkpoint)
            self._rest.values = dict(asked.values)

        self._run(place).save(key, asked, put)
        forget_listing(path)

    def load_checkpoint(
        self, path: Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint as Lightning knows it, in host memory.

        Args:
            path: a name, a run (its newest checkpoint that is whole), `run@step`, a step directory,
                or what Lightning itself wrote. A name that begins with `last` means the newest.
            map_location: a device for the tensors; None for host memory.
            weights_only: of what Lightning wrote, see there; nothing of ours is ever executed.

        Raises:
            NotFound: there is no checkpoint.
            IntegrityError: it is damaged, and another one was not asked for.
        """
        found = find(path, newest=NEWEST)
        if found is None:
            return read_as_lightning(path, map_location, weights_only)
        run = self._run(found.place)
        # Looked at and not taken over: every rank reads here, and rank 0 alone saves.
        report = run.look(found, self._state(), only=_PARTS)
        run.go_on_from(report)
        name = run.name_of(found, report)
        loaded = {**self._rest.of(name), "state_dict": self._model.value}
        # Handed over: what is kept here stays in memory until the next save.
        optimizer, self._model.value, self._optimizer.value = self._optimizer.value, None, None
        # The save behind a name of the model alone may have more.
        if optimizer is not None and (name is None or name.full):
            loaded["optimizer_states"] = optimizer if isinstance(optimizer, list) else [optimizer]
        # Other forms of it choose by where a tensor was, and these are in host memory.
        if isinstance(map_location, str | torch.device):
            loaded = move_data_to_device(loaded, torch.device(map_location))
        return loaded

    def remove_checkpoint(self, path: Path) -> None:
        """Remove a name, and its checkpoint when nothing else names it and it may go.

        See `dist_ckpt.Run.remove` for what is protected.
        """
        place, key = place_and_key(path)
        self._run(place).remove(key)
        forget_listing(path)

    def teardown(self) -> None:
        """Finish what is in flight.

        Raises:
            CheckpointError: a save failed.
        """
        for run in self._runs.values():
            run.close()

    def _state(self) -> TrainState:
        return TrainState(
            # `RandomState` keeps those of every rank; the plugin is asked on rank 0 alone.
            rng=None,
            model=self._model,
            optimizer=self._optimizer,
            lightning=PerRank(self._rest),
        )

    def _run(self, place: str) -> NamedRun:
        if place not in self._runs:
            self._runs[place] = NamedRun(
                place,
                self._state,
                ranks="alone",
                discard_newer=self._discard_newer,
                timeout_seconds=self._timeout_seconds,
            )
        return self._runs[place]


class DistCkptStrategy:
    """To be mixed into a strategy: every rank saves and reads its share, in the background.

    ```python
    from lightning.pytorch.strategies import ModelParallelStrategy

    from dist_ckpt.integrations.lightning import DistCkptStrategy

    class Sharded(DistCkptStrategy, ModelParallelStrategy):
        pass
    ```

    What is saved by one strategy is loaded by any other, at any number of ranks, and so is what
    `DistCkptIO` saved. The random number generators of each rank are part of it. Hooks that change
    `checkpoint["state_dict"]` have nothing to change: the model is saved where it lies.

    Args:
        *args: of the strategy.
        trainable_only: whether only parameters that require gradients are saved.
        discard_newer: see `DistCkptIO`.
        timeout_seconds: after this long a save or a load fails on every rank.
        **kwargs: of the strategy.

    Raises:
        UsageError: it is FSDP1, or DeepSpeed.
    """

    # Of the strategy that this is mixed into.
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    lightning_module: Any
    broadcast: Callable[[Any], Any]
    global_rank: int
    world_size: int

    def __init__(
        self,
        *args: Any,
        trainable_only: bool = False,
        discard_newer: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
        **kwargs: Any,
    ) -> None:
        warn_if_untested("lightning", first=TESTED, last=TESTED)
        refuse_strategy(self)
        super().__init__(*args, **kwargs)
        self._trainable_only = trainable_only
        self._options: dict[str, Any] = {
            "discard_newer": discard_newer,
            "timeout_seconds": timeout_seconds,
        }
        self._rest = Rest()
        self._switched: OptimizersIfFull | None = None
        self._runs: dict[str, NamedRun] = {}
        self._error: BaseException | None = None
        self._is_ours = False

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether the model is set up first: what is loaded is filled where it lies."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizers."""
        # What is ours was filled by `load_checkpoint`, optimizers too.
        return not self._is_ours and bool(getattr(super(), "lightning_restore_optimizer", True))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: no copy of the model is made or gathered for a save."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return nothing, as for the model."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Path, storage_options: Any | None = None
    ) -> None:
        """Begin to save; return when the state may change again. See `DistCkptIO`."""
        _refuse_options(storage_options)
        # All save under the name that rank 0 has.
        path = self.broadcast(os.fspath(filepath))
        place, key = place_and_key(path)
        states = [optimizer.state for optimizer in self.optimizers]
        live = [*self.model.parameters(), *self.model.buffers()]
        asked = asked_for(
            checkpoint, key, tensors=(live, [list(state.values()) for state in states])
        )

        def put() -> None:
            self._rest.values = dict(asked.values)
            if self._switched is not None:
                self._switched.full = asked.full

        self._run(place).save(key, asked, put)
        forget_listing(path)

    def load_checkpoint(
        self, checkpoint_path: Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill the model and, in `fit`, the optimizers; return the rest. See `DistCkptIO`."""
        path = self.broadcast(os.fspath(checkpoint_path))
        # What rank 0 found: another rank may not see the file yet.
        found: PointedAt | None = self.broadcast(find(path, newest=NEWEST))
        self._is_ours = found is not None
        if found is None:
            say_imported(path)
            loaded: dict[str, Any] = super().load_checkpoint(path, weights_only)  # type: ignore[misc]
            return loaded
        run = self._run(found.place)
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if not fits:
            report = run.look(found, self._state(without=True), only=["model", "lightning"])
        else:
            report = run.restore(found)
        name = run.name_of(found, report)
        if fits and name is not None and name.random:
            random_of(name, rank=self.global_rank, world_size=self.world_size)
        # Empty: the model was filled where it lies, and `load_model_state_dict` does nothing.
        return {"state_dict": {}, **self._rest.of(name)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing, as the model is filled already, unless Lightning itself wrote it."""
        if not self._is_ours:
            super().load_model_state_dict(checkpoint, strict)  # type: ignore[misc]

    def remove_checkpoint(self, filepath: Path) -> None:
        """Remove a name, and its checkpoint when it may go. See `DistCkptIO`."""
        place, key = place_and_key(filepath)
        self._run(place).remove(key)
        forget_listing(filepath)

    def on_exception(self, exception: BaseException) -> None:
        """Take note that training ends so: other ranks may not come to the end."""
        self._error = exception
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        """Finish what is in flight.

        Raises:
            CheckpointError: a save failed.
        """
        error, self._error = self._error, None
        try:
            for run in self._runs.values():
                run.close(error)
        finally:
            # Also where a save failed: Lightning has things of its own to give back.
            super().teardown()  # type: ignore[misc]

    def _state(self, *, without: bool = False) -> TrainState:
        """Return what is live; `without` optimizers, which may be of another model."""
        model = ModelPart(self.model, name="model", trainable_only=self._trainable_only)
        parts: dict[str, Any] = {"model": model, "lightning": PerRank(self._rest)}
        # That of a state made before is of optimizers that may be gone.
        self._switched = None
        if self.optimizers and not without:
            live = self.optimizers[0] if len(self.optimizers) == 1 else list(self.optimizers)
            self._switched = OptimizersIfFull(live, models=[model], name="optimizer")
            parts["optimizer"] = self._switched
        return TrainState(**parts)

    def _run(self, place: str) -> NamedRun:
        if place not in self._runs:
            self._runs[place] = NamedRun(place, self._state, with_random=True, **self._options)
        return self._runs[place]


class DistCkptSingleDeviceStrategy(DistCkptStrategy, SingleDeviceStrategy):
    """One process: what several ranks saved goes on here."""


class DistCkptDDPStrategy(DistCkptStrategy, DDPStrategy):
    """DDP, where each rank writes its share of what all of them have."""


class DistCkptModelParallelStrategy(DistCkptStrategy, ModelParallelStrategy):
    """FSDP2 and tensor parallelism."""


def _refuse_options(storage_options: Any | None) -> None:
    if storage_options is not None:
        raise UsageError(
            "save_checkpoint takes no storage_options: credentials and endpoints are those of the "
            "environment, or of a store that is registered"
        )


# What a checkpoint of Lightning is made of, as parts of a state, and what is said of it.


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
        # One for each rank that saved; at another number of ranks those of rank 0, as in `reshard`.
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
        # Item by item: an odd one takes no other along.
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


# Once for the same names, and not at each save.
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
            # By the name alone: the folder may be spelled otherwise.
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
    # The property of that name makes Lightning's own where none was given.
    plugin = vars(strategy)["_checkpoint_io"]
    if plugin is None or isinstance(plugin, TorchCheckpointIO):
        return
    refuse_strategy(strategy)
    # By the method, so that subclasses which leave it alone are found, too.
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
        # At another number of ranks those of rank 0, of which `RngPart` makes streams for each.
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
