"""Distributed sharded checkpoints for PyTorch training, from one process to thousands of ranks.

In a training loop: `Checkpointer` and `TrainState`, with retention from `keep`. Without a loop:
`save`, `async_save`, `load` and `load_weights`; `open_checkpoint` looks into one; `export`,
`import_` and `average` lead to and from the formats of others. Names are imported when
first used, so that a program which only lists, reads or verifies checkpoints never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("fcntl") is None:
    # Named here: what would fail later is an import deep inside of the storage room.
    raise ImportError(
        "dist_ckpt needs a POSIX system, such as Linux: this Python has no module fcntl, which "
        "locks files (on Windows use WSL 2)"
    )

if TYPE_CHECKING:
    from dist_ckpt import dcp as dcp
    from dist_ckpt import errors, events, policy
    from dist_ckpt import flags as flags
    from dist_ckpt import scalars as scalars
    from dist_ckpt.checkpointer import Checkpointer
    from dist_ckpt.doors.average import average
    from dist_ckpt.doors.export import export
    from dist_ckpt.doors.importing import import_
    from dist_ckpt.errors import CheckpointError
    from dist_ckpt.functional import async_save, load, load_weights, save
    from dist_ckpt.loading.opened import open_checkpoint
    from dist_ckpt.repository import keep
    from dist_ckpt.run import Run
    from dist_ckpt.state.early_stopping import EarlyStopping
    from dist_ckpt.state.progress import Progress
    from dist_ckpt.state.registry import register as register_type
    from dist_ckpt.state.sampler import ElasticSampler
    from dist_ckpt.state.slots import PerRank
    from dist_ckpt.state.train_state import TrainState

__version__ = "0.1.0"

__all__ = [
    "Checkpointer",
    "TrainState",
    "PerRank",
    "ElasticSampler",
    "save",
    "async_save",
    "load",
    "load_weights",
    "open_checkpoint",
    "export",
    "import_",
    "average",
    "keep",
    "Run",
    "policy",
    "EarlyStopping",
    "Progress",
    "register_type",
    "errors",
    "events",
    "CheckpointError",
]

# Where each public name lives: a module, and the name in it or None for the module itself.
_HOMES: dict[str, tuple[str, str | None]] = {
    "Checkpointer": ("dist_ckpt.checkpointer", "Checkpointer"),
    "TrainState": ("dist_ckpt.state.train_state", "TrainState"),
    "PerRank": ("dist_ckpt.state.slots", "PerRank"),
    "ElasticSampler": ("dist_ckpt.state.sampler", "ElasticSampler"),
    "save": ("dist_ckpt.functional", "save"),
    "async_save": ("dist_ckpt.functional", "async_save"),
    "load": ("dist_ckpt.functional", "load"),
    "load_weights": ("dist_ckpt.functional", "load_weights"),
    "open_checkpoint": ("dist_ckpt.loading.opened", "open_checkpoint"),
    "export": ("dist_ckpt.doors.export", "export"),
    "import_": ("dist_ckpt.doors.importing", "import_"),
    "average": ("dist_ckpt.doors.average", "average"),
    "keep": ("dist_ckpt.repository.keep", None),
    "Run": ("dist_ckpt.run", "Run"),
    "policy": ("dist_ckpt.policy", None),
    "EarlyStopping": ("dist_ckpt.state.early_stopping", "EarlyStopping"),
    "Progress": ("dist_ckpt.state.progress", "Progress"),
    "register_type": ("dist_ckpt.state.registry", "register"),
    "errors": ("dist_ckpt.errors", None),
    "events": ("dist_ckpt.events", None),
    "CheckpointError": ("dist_ckpt.errors", "CheckpointError"),
}


# Modules with public names of their own, of which few programs need more than one.
_MODULES = ("dcp", "flags", "scalars")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, attribute = _HOMES[name]
    module = import_module(home)
    value: object = module if attribute is None else getattr(module, attribute)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
