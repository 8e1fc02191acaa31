"""Random number generators: those of this process, and those that the program made itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import singledispatch
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import torch

from dist_ckpt.errors import IncompatibleError, UsageError, describe
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
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
        """Return no tensors: the states are objects.

        Raises:
            IncompatibleError: as `restore`, before anything has changed.
        """
        if stored.world_size == stored.saved_world_size:
            # Tried out and taken back: nobody else can tell what a generator takes.
            before = {kind: read() for kind, read in _READ.items() if kind != "cuda"}
            values = self._decoded(stored)
            try:
                self._asked(lambda: _set_host(values))
            finally:
                _set_host(before)
        unexpected = stored.tensors.keys() | (stored.objects.keys() - _READ.keys())
        missing = sorted(_READ.keys() - stored.objects.keys())
        return Targets({}, missing, sorted(unexpected), _fresh_note(self.name, stored))

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set every generator; the last thing to restore, since anything before may draw.

        Raises:
            IncompatibleError: this Python, numpy or torch refuses the stored state.
        """
        if stored.world_size != stored.saved_world_size:
            _seed_all(stored)
            return
        # All are decoded before the first is set.
        values = self._decoded(stored)

        def set_all() -> None:
            _set_host(values)
            _set_devices(values, stored)

        self._asked(set_all)

    def _decoded(self, stored: Stored) -> dict[str, Any]:
        return {
            kind: decode(stored.objects[kind], tensors={}, path=f"{self.name}.{kind}")
            for kind in _READ
            if kind in stored.objects
        }

    def _asked(self, act: Callable[[], None]) -> None:
        try:
            act()
        # Whatever they make of a state that they never had.
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise IncompatibleError(
                f"{self.name}: a generator refused its stored state: {describe(error)}; "
                "load with the versions that saved it, or leave the part out"
            ) from error


def _set_host(values: Mapping[str, Any]) -> None:
    if "python" in values:
        random.setstate(values["python"])
    if "numpy" in values:
        np.random.set_state(values["numpy"])
    if "torch" in values:
        torch.set_rng_state(values["torch"])


def _set_devices(values: Mapping[str, Any], stored: Stored) -> None:
    if torch.cuda.is_available():
        states = values.get("cuda", [])
        # One by one: the number of devices may have changed while the number of ranks has not.
        for device in range(torch.cuda.device_count()):
            if device < len(states):
                torch.cuda.set_rng_state(states[device], device)
            else:  # saved where there were fewer devices
                _seed_cuda(device, stored)


def _seed_all(stored: Stored) -> None:
    random.seed(_seed_of(stored, "python"))
    np.random.seed(np.frombuffer(_fresh(stored, "numpy"), dtype="<u4").astype(np.uint32))
    torch.default_generator.manual_seed(_seed_of(stored, "torch"))
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            _seed_cuda(device, stored)


def _seed_cuda(device: int, stored: Stored) -> None:
    # By a generator of its own: making the device current would set up a context on it.
    seeded = torch.Generator(f"cuda:{device}").manual_seed(_seed_of(stored, f"cuda:{device}"))
    torch.cuda.set_rng_state(seeded.get_state(), device)


def _seed_of(stored: Stored, kind: str) -> int:
    # 63 bits: torch takes a signed integer.
    return int.from_bytes(_fresh(stored, kind)[:8], "little") >> 1


def _fresh(stored: Stored, kind: str) -> bytes:
    # Only of its own kind: a program that seeds torch and not Python is repeatable all the same.
    # A GPU's stream also depends on torch's, because a save without GPUs has nothing of its own.
    own = kind.partition(":")[0]
    return _fresh_seed(stored, kind, (own, "torch") if own == "cuda" else (own,))


# Streams of random numbers for ranks that have none of their own to continue.


def _fresh_seed(stored: Stored, kind: str, sources: Iterable[str]) -> bytes:
    """Return 32 bytes to seed a generator with: repeatable, and different on every rank.

    Args:
        stored: what the checkpoint holds; the world size and the rank in it are those of now.
        kind: what is seeded, so that two generators of one rank differ.
        sources: the stored objects that the seed comes from.
    """
    # Not Python's hash, which is salted per process, nor a sum, by which near ranks would collide.
    digest = blake2b(digest_size=32)
    for name in sources:
        digest.update(stored.objects.get(name, b""))
    digest.update(f"/{kind}/{stored.world_size}/{stored.rank}".encode())
    return digest.digest()


def _fresh_note(name: str, stored: Stored) -> str | None:
    """Return what a report says of generators that could not be continued, None if they were."""
    if stored.world_size == stored.saved_world_size:
        return None
    return (
        f"{name}: saved by {stored.saved_world_size} ranks and loaded by {stored.world_size}, so "
        "every rank draws from a new stream, made from the checkpoint, the world size and its rank"
    )


# Random number generators that the program made itself, as parts.


Generator: TypeAlias = np.random.Generator | np.random.RandomState | torch.Generator | random.Random

_NAME = "value"
# Beside the keys that numpy has in the state of a generator.
_SEED = "seed_seq"


class GeneratorPart:
    """One generator, per rank; at another world size it starts a new stream, as `RngPart` does.

    Generators that numpy's `Generator.spawn` made are parts of their own. How many were spawned is
    kept, so that the next one is not like one that there is already.
    """

    def __init__(self, generator: Generator, *, name: str) -> None:
        """Take the generator itself.

        Raises:
            UsageError: it draws from the operating system, and has no state to keep.
        """
        if isinstance(generator, random.SystemRandom):
            raise UsageError(
                f"part {name!r}: a SystemRandom draws from the operating system and has no state: "
                "leave it out, or use random.Random(seed)"
            )
        self.generator = generator
        self.name = name

    def capture(self) -> Captured:
        """Return the state of the generator, encoded."""
        data = encode(_read(self.generator), path=self.name)
        return Captured({}, {_NAME: data}, per_rank=True)

    def targets(self, stored: Stored) -> Targets:
        """Return no tensors: the state is an object.

        Raises:
            IncompatibleError: as `restore`, before anything has changed.
        """
        if _NAME in stored.objects and stored.world_size == stored.saved_world_size:
            before = _read(self.generator)  # tried out, and taken back
            try:
                self._set(stored)
            finally:
                _write(self.generator, before)
        missing = [] if _NAME in stored.objects else [_NAME]
        unexpected = sorted(stored.tensors.keys() | (stored.objects.keys() - {_NAME}))
        return Targets({}, missing, unexpected, _fresh_note(self.name, stored))

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the generator; programs that hold it go on with it.

        Raises:
            IncompatibleError: it is of another kind than the stored one.
        """
        if _NAME not in stored.objects:
            return
        if stored.world_size != stored.saved_world_size:
            _seed_one(self.generator, _fresh_seed(stored, self.name, [_NAME]))
            return
        self._set(stored)

    def _set(self, stored: Stored) -> None:
        state = decode(stored.objects[_NAME], tensors={}, path=self.name)
        try:
            _write(self.generator, state)
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            kind = type(self.generator).__qualname__
            raise IncompatibleError(
                f"{self.name}: this {kind} refused the stored state: {describe(error)}; make it "
                "of the kind that was saved, or leave the part out"
            ) from error


@singledispatch
def _read(generator: object) -> object:
    raise UsageError(f"{type(generator).__qualname__} is no random number generator")


@_read.register
def _(generator: np.random.Generator) -> object:
    state = dict(generator.bit_generator.state)
    seed = getattr(generator.bit_generator, "seed_seq", None)  # numpy before 1.25 shows none
    # One of another kind cannot be made anew, and one that was given a key alone has none.
    if type(seed) is np.random.SeedSequence:
        state[_SEED] = seed.state
    return state


@_read.register
def _(generator: np.random.RandomState) -> object:
    return generator.get_state(legacy=False)


@_read.register
def _(generator: torch.Generator) -> object:
    return generator.get_state()


@_read.register
def _(generator: random.Random) -> object:
    return generator.getstate()


@singledispatch
def _write(generator: object, state: Any) -> None:
    raise UsageError(f"{type(generator).__qualname__} is no random number generator")


@_write.register
def _(generator: np.random.Generator, state: Any) -> None:
    state = dict(state)
    seed = state.pop(_SEED, None)
    generator.bit_generator.state = state
    if seed is not None:
        _seed_from(generator, np.random.SeedSequence(**seed))


def _seed_from(generator: np.random.Generator, seed: np.random.SeedSequence) -> None:
    """Let what `generator` spawns come from `seed`; its own stream stays what it is."""
    bits: Any = generator.bit_generator
    # As numpy's own unpickling does, from 2 on: before, there is no way to give it one, and what is
    # spawned begins anew.
    with suppress(TypeError):
        bits.__setstate__((bits.state, seed))


@_write.register
def _(generator: np.random.RandomState, state: Any) -> None:
    generator.set_state(state)


@_write.register
def _(generator: torch.Generator, state: Any) -> None:
    generator.set_state(state)


@_write.register
def _(generator: random.Random, state: Any) -> None:
    generator.setstate(state)


@singledispatch
def _seed_one(generator: object, seed: bytes) -> None:
    raise UsageError(f"{type(generator).__qualname__} is no random number generator")


@_seed_one.register
def _(generator: np.random.Generator, seed: bytes) -> None:
    # A bit generator cannot be seeded again: another one of its kind lends its state.
    kind: Any = type(generator.bit_generator)
    fresh = kind(int.from_bytes(seed, "little"))
    generator.bit_generator.state = fresh.state
    _seed_from(generator, fresh.seed_seq)


@_seed_one.register
def _(generator: np.random.RandomState, seed: bytes) -> None:
    generator.seed(np.frombuffer(seed, dtype="<u4").astype(np.uint32))


@_seed_one.register
def _(generator: torch.Generator, seed: bytes) -> None:
    # 63 bits: torch takes a signed integer.
    generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)


@_seed_one.register
def _(generator: random.Random, seed: bytes) -> None:
    generator.seed(seed)
