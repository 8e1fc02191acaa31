"""Random number generators: the next draw is the same, or well defined."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.part import Stored
from dist_ckpt.state.rng import RngPart
from tests.unit.state.roundtrip import Saved, load, save

Draw = tuple[float, float, float, float]


@pytest.fixture(autouse=True)
def _leave_the_generators_alone() -> Iterator[None]:
    before = save(RngPart())
    yield
    load(RngPart(), before)


def draw() -> Draw:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        torch.randn(()).item(),
    )


def test_the_next_draws_are_the_same() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # both keep a second value in hand
    torch.randn(3)
    part = RngPart()
    saved = save(part)
    expected = [draw() for _ in range(3)]
    draw()
    load(part, saved)
    assert [draw() for _ in range(3)] == expected


def test_capturing_draws_nothing() -> None:
    part = RngPart()
    saved = save(part)
    first = draw()
    load(part, saved)
    captured = part.capture()
    part.capture()
    assert draw() == first
    assert captured.per_rank
    assert not captured.tensors
    assert set(captured.objects) == {"python", "numpy", "torch", "cuda"}
    if not torch.cuda.is_available():
        assert decode(captured.objects["cuda"], tensors={}) == []


def at(saved: Saved, rank: int, world_size: int) -> Draw:
    part = RngPart()
    stored = saved.stored(rank=rank, world_size=world_size, saved=2)
    assert part.targets(stored).missing == []
    part.restore(stored, {})
    return draw()


def test_at_another_world_size_streams_are_repeatable_and_independent() -> None:
    saved = save(RngPart())
    places = [(rank, world_size) for world_size in (1, 3, 4) for rank in range(world_size)]
    draws = {place: at(saved, *place) for place in places}
    for rank in range(4):
        for column in zip(*draws.values(), strict=True):
            assert len(set(column)) == len(places)
        assert at(saved, rank, 4) == draws[rank, 4]
    draw()
    assert at(save(RngPart()), 0, 1) != draws[0, 1]


def test_the_rule_of_the_streams_is_fixed() -> None:
    """A checkpoint that is loaded twice gives the same streams, by whatever version."""
    names = ("python", "numpy", "torch", "cuda")
    fixed = Saved({}, {name: encode(0, path=name) for name in names})
    drawn = at(fixed, 1, 3)
    assert drawn[0] == 0.287322579807086
    assert drawn == at(fixed, 1, 3)


def test_names_are_compared() -> None:
    saved = save(RngPart())
    objects = {name: data for name, data in saved.objects.items() if name != "numpy"}
    targets = RngPart().targets(Saved({"t": torch.zeros(1)}, {**objects, "jax": b"1"}).stored())
    assert (targets.missing, targets.unexpected) == (["numpy"], ["jax", "t"])


def test_a_lenient_load_leaves_out_what_is_not_stored() -> None:
    state = random.getstate()
    RngPart().restore(Stored({}, {}, 0, 1, 1), {})
    assert random.getstate() == state


@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_a_state_of_another_kind_is_refused(kind: str) -> None:
    objects = {kind: encode([1, 2], path="x")}
    with pytest.raises(IncompatibleError, match="rng: a generator refused"):
        RngPart().restore(Saved({}, objects).stored(), {})
