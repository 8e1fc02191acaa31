"""Ways to save the same state: this package, what torch has, and two libraries.

The libraries are measured where they can be imported; `make bench-saving` installs them, and
nothing else does. Each is called as its own documentation does it on a machine without GPUs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.workload import State
from dist_ckpt import Checkpointer, TrainState
from dist_ckpt.dcp import Writer

OURS = "dist_ckpt"
STOCK = "torch DCP async_save"

Wait = Callable[[], object]


class Peer(Protocol):
    """One way to save one state into one folder."""

    def start(self, number: int) -> Wait:
        """Begin save `number`; return when the state may change, with what waits for its end."""
        ...

    def close(self) -> None:
        """Release what was kept between saves."""
        ...


class Ours:
    """`dist_ckpt.Checkpointer`, with what it does by default."""

    def __init__(self, place: Path, state: State) -> None:
        parts = TrainState(model=state.model, optimizer=state.optimizer, rng=None)
        self._checkpointer = Checkpointer(place, parts)

    def start(self, number: int) -> Wait:
        """Begin; see `Peer.start`."""
        return self._checkpointer.save(number).wait

    def close(self) -> None:
        """Release; see `Peer.close`."""
        self._checkpointer.close()


class Stock:
    """torch.distributed.checkpoint, in the background or not."""

    def __init__(self, place: Path, state: State) -> None:
        self._place = place
        self._state = state

    def start(self, number: int) -> Wait:
        """Begin; see `Peer.start`."""
        found = async_save(
            self._state.state_dict(), checkpoint_id=self._place / str(number), no_dist=True
        )
        if not isinstance(found, Future):
            raise TypeError("stock async_save gave no future")
        return found.result

    def close(self) -> None:
        """Release nothing: nothing is kept."""


class StockBlocking(Stock):
    """`torch.distributed.checkpoint.save`, which returns when all is written."""

    def start(self, number: int) -> Wait:
        """Save; see `Peer.start`."""
        place = self._place / str(number)
        save(self._state.state_dict(), checkpoint_id=place, no_dist=True)
        return _nothing


class OurWriter(Stock):
    """`torch.distributed.checkpoint.save` with the storage writer of this package."""

    def start(self, number: int) -> Wait:
        """Save; see `Peer.start`."""
        writer = Writer(self._place, step=number)
        save(self._state.state_dict(), storage_writer=writer, no_dist=True)
        return _nothing


class TorchSnapshot:
    """`torchsnapshot.Snapshot.async_take`."""

    def __init__(self, place: Path, state: State) -> None:
        self._library: Any = import_module("torchsnapshot")
        self._place = place
        self._app = {"model": state.model, "optimizer": state.optimizer}

    def start(self, number: int) -> Wait:
        """Begin; see `Peer.start`."""
        pending = self._library.Snapshot.async_take(str(self._place / str(number)), self._app)
        wait: Wait = pending.wait
        return wait

    def close(self) -> None:
        """Release nothing: nothing is kept."""


class TorchCheckpointing:
    """`torch_checkpointing.CheckpointManager`, without O_DIRECT: with it, ext4 says EINVAL."""

    def __init__(self, place: Path, state: State) -> None:
        library: Any = import_module("torch_checkpointing")
        storage: Any = import_module("torch_checkpointing.storage.filesystem")
        self._place = place
        self._state = state
        config = storage.LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = library.CheckpointManager.Config(storage_config=config).build()

    def start(self, number: int) -> Wait:
        """Begin; see `Peer.start`."""
        written = self._manager.save(str(self._place / str(number)), self._state.state_dict())
        # It copies on another thread: this is how an optimizer's step waits for that.
        with self._manager.lock():
            wait: Wait = written.result
        return wait

    def close(self) -> None:
        """End its process."""
        self._manager.close()


_PEERS: dict[str, Callable[[Path, State], Peer]] = {
    OURS: Ours,
    STOCK: Stock,
    "torch DCP save": StockBlocking,
    "torch DCP save, dcp.Writer": OurWriter,
    "torchsnapshot": TorchSnapshot,
    "torch_checkpointing": TorchCheckpointing,
}

NAMES = tuple(_PEERS)
BACKGROUND = (OURS, STOCK, "torchsnapshot", "torch_checkpointing")


def make(name: str, place: Path, state: State) -> Peer:
    """Return the peer `name`, which saves `state` below `place`.

    Raises:
        ImportError: its library is not installed, or does not run with this torch.
    """
    return _PEERS[name](place, state)


def settle(place: Path) -> None:
    """Make every file below `place` durable, as some of the peers do not."""
    for path in (place, *place.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def empty(place: Path) -> None:
    """Remove what was saved below `place`, and let the disk come to rest."""
    for path in place.iterdir():
        # The claim of a run outlives its checkpoints: it is why its owner may go on.
        if path.name != "claims":
            shutil.rmtree(path)
    settle(place)


def _nothing() -> None:
    pass
