"""The random number generators of this process: Python, numpy, torch CPU, every CUDA device."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dist_ckpt.errors import IncompatibleError, describe
from dist_ckpt.state.generators import fresh_note, fresh_seed
from dist_ckpt.state.objects import decode, encode
from dist_ckpt.state.part import Captured, Stored, Targets

_READ: dict[str, Callable[[], object]] = {
    "python": random.getstate,
    # As a dict: the tuple of old fits one kind of bit generator only, and another may be set.
    "numpy": lambda: np.random.get_state(legacy=False),
    "torch": torch.get_rng_state,
    "cuda": lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
}


class RngPart:
    """The global generators, per rank.

    At the world size of the save every rank continues its own streams. At another one no rank
    has a stream of its own to continue: each seeds its generators from a hash of the stored
    state of rank 0, the new world size and its rank. The streams are the same each time that
    checkpoint is loaded at that size, and differ between ranks and sizes.
    """

    def __init__(self, *, name: str = "rng") -> None:
        self.name = name

    def capture(self) -> Captured:
        """Return the state of every generator, encoded."""
        objects = {kind: encode(read(), path=f"{self.name}.{kind}") for kind, read in _READ.items()}
        return Captured({}, objects, per_rank=True)

    def targets(self, stored: Stored) -> Targets:
        """Return no tensors: the states are objects."""
        unexpected = stored.tensors.keys() | (stored.objects.keys() - _READ.keys())
        missing = sorted(_READ.keys() - stored.objects.keys())
        return Targets({}, missing, sorted(unexpected), fresh_note(self.name, stored))

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set every generator; the last thing to restore, since anything before may draw.

        Raises:
            IncompatibleError: this Python, numpy or torch refuses the stored state.
        """
        if stored.world_size != stored.saved_world_size:
            _seed_all(stored)
            return
        # All are decoded before the first is set.
        values = {
            kind: decode(stored.objects[kind], tensors={}, path=f"{self.name}.{kind}")
            for kind in _READ
            if kind in stored.objects
        }
        try:
            _set_all(values, stored)
        # Whatever they make of a state that they never had.
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise IncompatibleError(
                f"{self.name}: a generator refused its stored state: {describe(error)}; "
                "load with the versions that saved it, or leave the part out"
            ) from error


def _set_all(values: Mapping[str, Any], stored: Stored) -> None:
    if "python" in values:
        random.setstate(values["python"])
    if "numpy" in values:
        np.random.set_state(values["numpy"])
    if "torch" in values:
        torch.set_rng_state(values["torch"])
    if torch.cuda.is_available():
        states = values.get("cuda", [])
        # One by one: the number of devices may have changed while the number of ranks has not.
        for device in range(torch.cuda.device_count()):
            if device < len(states):
                torch.cuda.set_rng_state(states[device], device)
            else:  # saved where there were fewer devices
                _seed_cuda(device, stored)


def _seed_all(stored: Stored) -> None:
    random.seed(_seed(stored, "python"))
    np.random.seed(np.frombuffer(_fresh(stored, "numpy"), dtype="<u4").astype(np.uint32))
    torch.default_generator.manual_seed(_seed(stored, "torch"))
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            _seed_cuda(device, stored)


def _seed_cuda(device: int, stored: Stored) -> None:
    # By a generator of its own: making the device current would set up a context on it.
    seeded = torch.Generator(f"cuda:{device}").manual_seed(_seed(stored, f"cuda:{device}"))
    torch.cuda.set_rng_state(seeded.get_state(), device)


def _seed(stored: Stored, kind: str) -> int:
    # 63 bits: torch takes a signed integer.
    return int.from_bytes(_fresh(stored, kind)[:8], "little") >> 1


def _fresh(stored: Stored, kind: str) -> bytes:
    # Only of its own kind: a program that seeds torch and not Python is repeatable all the same.
    # A GPU's stream also depends on torch's, because a save without GPUs has nothing of its own.
    own = kind.partition(":")[0]
    return fresh_seed(stored, kind, (own, "torch") if own == "cuda" else (own,))
