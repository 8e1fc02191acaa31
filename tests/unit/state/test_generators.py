"""Generators that the program made: the next draw is the same, or well defined."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.rng import Generator, GeneratorPart
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.state.roundtrip import load, save

MAKE: dict[str, Callable[[int], Generator]] = {
    "pcg64": np.random.default_rng,
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "mt19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "legacy": np.random.RandomState,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": random.Random,
}


def draw(generator: Generator) -> tuple[float, float]:
    if isinstance(generator, torch.Generator):
        first, second = torch.randn(2, generator=generator).tolist()
        return first, second
    if isinstance(generator, random.Random):
        return generator.gauss(0, 1), generator.random()
    # The first leaves half a word behind, which a state without it would lose.
    return float(generator.standard_normal(dtype=np.float32)) if isinstance(
        generator, np.random.Generator
    ) else float(generator.standard_normal()), float(generator.uniform())


@pytest.mark.parametrize("kind", MAKE)
def test_the_next_draws_are_the_same_in_the_very_object(kind: str) -> None:
    generator = MAKE[kind](3)
    draw(generator)
    part = TrainState(rng=None, noise=generator).parts["noise"]
    saved = save(part)
    assert part.capture().per_rank
    expected = [draw(generator) for _ in range(5)]
    load(part, saved)
    assert [draw(generator) for _ in range(5)] == expected
    other = MAKE[kind](4)
    load(GeneratorPart(other, name="noise"), saved)
    assert [draw(other) for _ in range(5)] == expected


@pytest.mark.parametrize("given", [random.SystemRandom(), PerRank(random.SystemRandom())])
def test_one_without_a_state_is_refused_when_it_is_given(given: Any) -> None:
    with pytest.raises(UsageError, match=r"part .noise.: a SystemRandom .* has no state"):
        TrainState(noise=given)


@pytest.mark.parametrize("kind", MAKE)
def test_at_another_world_size_every_rank_has_a_stream_of_its_own(kind: str) -> None:
    saved = save(GeneratorPart(MAKE[kind](3), name="noise"))

    def at(rank: int, world_size: int, name: str = "noise") -> tuple[float, float]:
        generator = MAKE[kind](9)
        part = GeneratorPart(generator, name=name)
        stored = saved.stored(rank=rank, world_size=world_size, saved=2)
        note = part.targets(stored).note
        assert note is not None
        assert "saved by 2 ranks" in note
        part.restore(stored, {})
        return draw(generator)

    places = [(rank, world_size) for world_size in (1, 3) for rank in range(world_size)]
    draws = [at(*place) for place in places]
    assert len(set(draws)) == len(places)
    assert [at(*place) for place in places] == draws
    # Two generators of one rank, saved in one state, go their own ways.
    assert at(0, 3, "other") != at(0, 3)


@pytest.mark.skipif(int(np.__version__[0]) < 2, reason="numpy cannot be told what it spawned")
def test_what_is_spawned_next_is_no_copy_of_what_was_spawned() -> None:
    generator = np.random.default_rng(3).spawn(2)[1]
    generator.spawn(4)
    part = GeneratorPart(generator, name="noise")
    saved = save(part)
    expected = draw(generator), [draw(each) for each in generator.spawn(2)]
    for other in (generator, np.random.default_rng(3).spawn(2)[1], np.random.default_rng()):
        load(GeneratorPart(other, name="noise"), saved)
        assert (draw(other), [draw(each) for each in other.spawn(2)]) == expected
    fresh = []
    for rank in range(2):
        other = np.random.default_rng(3)
        stored = saved.stored(rank=rank, world_size=2, saved=1)
        GeneratorPart(other, name="noise").restore(stored, {})
        fresh.append(draw(other.spawn(1)[0]))
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("kind", MAKE)
def test_one_may_be_marked_as_of_each_rank_which_it_is(kind: str) -> None:
    generator = MAKE[kind](3)
    part = TrainState(noise=PerRank(generator)).parts["noise"]
    assert isinstance(part, GeneratorPart)
    saved = save(part)
    expected = draw(generator)
    load(part, saved)
    assert draw(generator) == expected


def test_one_that_cannot_spawn_comes_back_as_well() -> None:
    generator = np.random.Generator(np.random.Philox(key=3))
    part = GeneratorPart(generator, name="noise")
    saved = save(part)
    expected = draw(generator)
    load(part, saved)
    assert draw(generator) == expected


def test_a_generator_of_another_kind_is_refused_by_name() -> None:
    saved = save(GeneratorPart(np.random.default_rng(1), name="noise"))
    for other in (np.random.Generator(np.random.Philox(1)), torch.Generator(), random.Random(1)):
        with pytest.raises(IncompatibleError, match=r"noise: this .* refused the stored state"):
            load(GeneratorPart(other, name="noise"), saved)


@pytest.mark.parametrize("name", ["rng", "noise"])
def test_a_refusal_comes_before_anything_has_changed(name: str) -> None:
    of_numpy: Any = np.random
    own = of_numpy.get_bit_generator()
    of_numpy.set_bit_generator(np.random.PCG64(3))
    noise = np.random.default_rng(1)
    store = MemoryStore(f"unit-generators-{name}")
    try:
        dist_ckpt.save({"w": {"w": torch.ones(2)}, "noise": noise}, store)
    finally:
        of_numpy.set_bit_generator(own)
    other = noise if name == "rng" else np.random.Generator(np.random.Philox(1))
    before = [repr(random.getstate()), repr(other.bit_generator.state)]
    live: dict[str, Any] = {"w": {"w": torch.zeros(2)}, "noise": other}
    skip = [] if name == "rng" else ["rng"]
    with pytest.raises(IncompatibleError, match=rf"^{name}: .* refused (its|the) stored state"):
        dist_ckpt.load(live, store, skip=skip)
    assert live["w"]["w"].tolist() == [0, 0]
    assert [repr(random.getstate()), repr(other.bit_generator.state)] == before
