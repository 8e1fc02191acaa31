"""Ways to load the same state: this package, what torch has, and two libraries.

Each loads what it wrote itself, into tensors that are there, as its own documentation does it on
a machine without GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dist_ckpt
from benchmarks.workload import State
from dist_ckpt import TrainState

OURS = "dist_ckpt"
SMALL = "dist_ckpt, in_flight 32 MiB"
STOCK = "torch DCP load"

SMALL_BYTES = 32 << 20


class Way(Protocol):
    """One way to save and load one state."""

    def save(self) -> None:
        """Write the checkpoint that is loaded afterwards."""
        ...

    def load(self) -> None:
        """Fill the tensors of the state."""
        ...


class Ours:
    """`dist_ckpt.load`: everything is verified, and given to the parts."""

    def __init__(self, place: Path, state: State, **options: Any) -> None:
        self._place = place
        self._parts = TrainState(model=state.model, optimizer=state.optimizer, rng=None)
        self._options = options

    def save(self) -> None:
        """Save; see `Way.save`."""
        dist_ckpt.save(self._parts, self._place)

    def load(self) -> None:
        """Load; see `Way.load`."""
        report = dist_ckpt.load(self._parts, self._place, **self._options)
        if not report.verified:
            raise AssertionError("what is measured is a verified load")


class Stock:
    """`torch.distributed.checkpoint`, in place."""

    def __init__(self, place: Path, state: State) -> None:
        self._place = place
        self._state = state

    def save(self) -> None:
        """Save; see `Way.save`."""
        dcp_save(self._state.state_dict(), checkpoint_id=self._place, no_dist=True)

    def load(self) -> None:
        """Load; see `Way.load`."""
        dcp_load(self._state.state_dict(), checkpoint_id=self._place, no_dist=True)


class TorchSnapshot:
    """`torchsnapshot.Snapshot.restore`."""

    def __init__(self, place: Path, state: State) -> None:
        self._library: Any = import_module("torchsnapshot")
        self._place = str(place)
        self._app = {"model": state.model, "optimizer": state.optimizer}

    def save(self) -> None:
        """Save; see `Way.save`."""
        self._library.Snapshot.take(self._place, self._app)

    def load(self) -> None:
        """Load; see `Way.load`."""
        self._library.Snapshot(self._place).restore(self._app)


class TorchCheckpointing:
    """`torch_checkpointing.CheckpointManager`, without O_DIRECT: with it, ext4 says EINVAL."""

    def __init__(self, place: Path, state: State) -> None:
        self._place = str(place / "1")
        self._state = state

    def save(self) -> None:
        """Save; see `Way.save`."""
        manager = self._manager()
        manager.save(self._place, self._state.state_dict()).result()
        manager.close()

    def load(self) -> None:
        """Load; see `Way.load`."""
        manager = self._manager()
        manager.load(self._place, into=self._state.state_dict())
        manager.close()

    def _manager(self) -> Any:
        library: Any = import_module("torch_checkpointing")
        storage: Any = import_module("torch_checkpointing.storage.filesystem")
        config = storage.LocalFileSystemStorageConfig(use_direct_io=False)
        return library.CheckpointManager.Config(storage_config=config).build()


_WAYS: dict[str, Callable[[Path, State], Way]] = {
    OURS: Ours,
    SMALL: lambda place, state: Ours(place, state, in_flight_bytes=SMALL_BYTES),
    STOCK: Stock,
    "torchsnapshot": TorchSnapshot,
    "torch_checkpointing": TorchCheckpointing,
}

NAMES = (OURS, STOCK, "torchsnapshot", "torch_checkpointing")


def make(name: str, place: Path, state: State) -> Way:
    """Return the way `name` to load `state` from `place`, a folder of its own.

    Raises:
        ImportError: its library is not installed, or does not run with this torch.
    """
    return _WAYS[name](place, state)
