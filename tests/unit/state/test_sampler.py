"""Position in the data: one order for all world sizes, resumed exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.sampler import ElasticSampler


class Numbers(Dataset[torch.Tensor]):
    """Sample i is i and a random number, if asked for drawn from the worker's generator."""

    def __init__(self, length: int, *, noise: bool = False) -> None:
        self.length = length
        self.noise = noise

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand((), dtype=torch.float64) if self.noise else torch.zeros(())
        return torch.stack([torch.tensor(index, dtype=torch.float64), noise.double()])

    def __len__(self) -> int:
        return self.length


def loader_of(sampler: ElasticSampler, **options: Any) -> DataLoader[torch.Tensor]:
    noise = options.pop("noise", False)
    return DataLoader(Numbers(sampler.length, noise=noise), batch_sampler=sampler, **options)


def ids(batch: torch.Tensor) -> list[int]:
    return [int(index) for index in batch[:, 0].tolist()]


def take(sampler: ElasticSampler, count: int, **options: Any) -> list[list[int]]:
    batches = sampler.batches(loader_of(sampler, **options))
    return [ids(batch) for batch in itertools.islice(batches, count)]


# ------------------------------------------------------------------ the order


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 60),
    global_batch=st.integers(1, 12),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**70),
)
def test_the_ranks_share_out_the_same_global_batches(
    length: int, global_batch: int, world_size: int, drop_last: bool, seed: int
) -> None:
    tail = length % global_batch
    if length < global_batch or global_batch < world_size or (tail and tail < world_size):
        drop_last = True
    if length < global_batch or global_batch < world_size:
        return
    options: dict[str, Any] = {"global_batch": global_batch, "seed": seed, "drop_last": drop_last}
    alone = ElasticSampler(length, rank=0, world_size=1, **options)
    ranks = [
        ElasticSampler(length, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    expected = list(alone)
    pieces = list(zip(*ranks, strict=True))
    assert len(expected) == len(alone) == len(ranks[-1])
    assert [list(itertools.chain(*piece)) for piece in pieces] == expected
    for piece in pieces:
        sizes = {len(part) for part in piece}
        assert max(sizes) - min(sizes) <= 1
    seen = list(itertools.chain(*expected))
    assert len(set(seen)) == len(seen) == (length - tail if drop_last else length)
    assert set(seen) <= set(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = ElasticSampler(100, global_batch=100)
    first, second = take(sampler, 2)
    assert sorted(first) == sorted(second) == list(range(100))
    other = take(ElasticSampler(100, global_batch=100, seed=1), 1)[0]
    assert len({tuple(order) for order in (first, second, other, range(100))}) == 4
    assert take(ElasticSampler(100, global_batch=100), 2) == [first, second]


def test_the_order_is_fixed_for_ever() -> None:
    assert take(ElasticSampler(8, global_batch=8), 2) == [
        [2, 7, 1, 6, 0, 3, 4, 5],
        [0, 4, 3, 1, 5, 7, 6, 2],
    ]


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    sampler = ElasticSampler(5, global_batch=2, shuffle=False, drop_last=False)
    assert take(sampler, 4) == [[0, 1], [2, 3], [4], [0, 1]]
    assert len(sampler) == 3
    assert len(ElasticSampler(5, global_batch=2)) == 2


# ------------------------------------------------------------------ position


def test_a_batch_is_counted_when_it_is_handed_out() -> None:
    sampler = ElasticSampler(10, global_batch=4)
    batches = itertools.islice(sampler.batches(loader_of(sampler, num_workers=2)), 5)
    seen = [(sampler.epoch, sampler.consumed) for _ in batches]
    assert seen == [(0, 4), (0, 8), (1, 4), (1, 8), (2, 4)]
    assert sampler.state_dict() == {
        "epoch": 2,
        "consumed": 4,
        "length": 10,
        "global_batch": 4,
        "seed": 0,
        "shuffle": True,
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 7])
def test_a_resume_goes_on_with_the_next_batch(workers: int, stop: int) -> None:
    whole = take(ElasticSampler(17, global_batch=4, rank=1, world_size=2), 10)
    first = ElasticSampler(17, global_batch=4, rank=1, world_size=2)
    before = take(first, stop, num_workers=workers)
    second = ElasticSampler(17, global_batch=4, rank=1, world_size=2, seed=9)
    second.load_state_dict(first.state_dict())
    assert before + take(second, 10 - stop, num_workers=workers) == whole
    assert second.seed == 0


def test_an_epoch_over_changing_world_sizes_has_each_sample_once() -> None:
    seen: list[int] = []
    state = ElasticSampler(120, global_batch=12).state_dict()
    for world_size, steps in ((2, 3), (3, 1), (1, 4), (4, 2)):
        ranks = [
            ElasticSampler(120, global_batch=12, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for sampler in ranks:
            sampler.load_state_dict(state)
            seen.extend(itertools.chain(*take(sampler, steps)))
        states = [sampler.state_dict() for sampler in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == list(range(120))


@pytest.mark.parametrize("drop_last", [True, False])
def test_another_global_batch_goes_on_behind_what_was_seen(drop_last: bool) -> None:
    first = ElasticSampler(50, global_batch=6, drop_last=drop_last)
    seen = list(itertools.chain(*take(first, 3)))
    second = ElasticSampler(50, global_batch=10, drop_last=drop_last)
    second.load_state_dict(first.state_dict())
    rest = take(second, 4)
    assert [len(batch) for batch in rest] == ([10, 10, 10, 10] if drop_last else [10, 10, 10, 2])
    same_epoch = rest[:3] if drop_last else rest
    seen += list(itertools.chain(*same_epoch))
    assert len(set(seen)) == len(seen) == (48 if drop_last else 50)


def test_a_restore_inside_the_loop_moves_it() -> None:
    sampler = ElasticSampler(40, global_batch=4)
    state, seen = sampler.state_dict(), []
    for batch in sampler.batches(loader_of(sampler, num_workers=2, persistent_workers=True)):
        seen.append(ids(batch))
        if len(seen) == 2:
            state = sampler.state_dict()
        if len(seen) == 4:
            sampler.load_state_dict(state)
        if len(seen) == 6:
            break
    assert seen[4:] == seen[2:4]
    assert sampler.consumed == 16


def test_leaving_the_loop_and_coming_back_goes_on() -> None:
    sampler = ElasticSampler(40, global_batch=4)
    parts = take(sampler, 3, num_workers=2) + take(sampler, 3)
    assert parts == take(ElasticSampler(40, global_batch=4), 6)


# ------------------------------------------------------------------ random numbers


def train(sampler: ElasticSampler, steps: int, **options: Any) -> list[Any]:
    """A loop that draws from torch's generator after every batch, as dropout does."""
    generator = options.pop("generator", lambda: None)()
    batches = sampler.batches(loader_of(sampler, generator=generator, **options))
    return [(batch.tolist(), torch.rand(2).tolist()) for batch in itertools.islice(batches, steps)]


@pytest.fixture
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize(
    ("workers", "generator", "noise"),
    [
        (2, lambda: torch.Generator().manual_seed(3), False),
        (2, lambda: None, False),
        (0, lambda: None, True),
    ],
    ids=["two workers and a generator", "two workers", "no worker and noise"],
)
def test_a_resume_in_the_middle_of_an_epoch_is_exact_to_the_bit(
    workers: int, generator: Callable[[], torch.Generator | None], noise: bool
) -> None:
    options: dict[str, Any] = {"num_workers": workers, "generator": generator, "noise": noise}
    start = torch.get_rng_state()
    whole = train(ElasticSampler(24, global_batch=4), 9, **options)
    torch.set_rng_state(start)
    first = ElasticSampler(24, global_batch=4)
    before = train(first, 2, **options)
    state, middle = first.state_dict(), torch.get_rng_state()
    torch.rand(100)
    second = ElasticSampler(24, global_batch=4)
    second.load_state_dict(state)
    torch.set_rng_state(middle)
    assert before + train(second, 7, **options) == whole


@pytest.mark.usefixtures("_seeded")
def test_workers_draw_differently_on_each_rank_and_at_each_start() -> None:
    noises = set()
    for rank, epochs in ((0, 2), (1, 1)):
        sampler = ElasticSampler(4, global_batch=4, rank=rank, world_size=2)
        batches = sampler.batches(loader_of(sampler, num_workers=1, noise=True))
        for batch in itertools.islice(batches, epochs):
            noises.update(batch[:, 1].tolist())
    assert len(noises) == 6


# ------------------------------------------------------------------ wrong use


def test_direct_iteration_leaves_no_position_to_store() -> None:
    sampler = ElasticSampler(8, global_batch=2)
    next(iter(loader_of(sampler)))
    with pytest.raises(UsageError, match=r"for batch in sampler\.batches\(loader\)"):
        sampler.state_dict()
    assert take(sampler, 1) == take(ElasticSampler(8, global_batch=2), 1)
    assert sampler.state_dict()["consumed"] == 2
    state = sampler.state_dict()
    list(sampler)
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state


def test_direct_iteration_inside_the_loop_is_seen_too() -> None:
    sampler = ElasticSampler(8, global_batch=2)
    loader = loader_of(sampler)
    for _ in itertools.islice(sampler.batches(loader), 1):
        list(loader)
        with pytest.raises(UsageError):
            sampler.state_dict()


def test_a_loader_of_another_sampler_is_refused() -> None:
    sampler = ElasticSampler(8, global_batch=2)
    with pytest.raises(UsageError, match="does not draw from this sampler"):
        next(sampler.batches(DataLoader(Numbers(8), batch_size=2)))


@pytest.mark.timeout(30)
def test_a_loader_that_ends_for_good_is_refused_where_it_ends() -> None:
    sampler = ElasticSampler(8, global_batch=2)
    loader = loader_of(sampler)

    def moved() -> Iterator[torch.Tensor]:
        for batch in loader:
            yield batch + 1

    batches = sampler.batches(moved())
    assert len([*itertools.islice(batches, 4)]) == 4
    with pytest.raises(UsageError, match=r"no batch of epoch 1.* iterated anew"):
        next(batches)
    with pytest.raises(UsageError, match="not an iterator of it"):
        next(sampler.batches(iter(loader)))
    with pytest.raises(UsageError, match="no batch of epoch 0"):
        next(ElasticSampler(8, global_batch=2).batches([]))


@pytest.mark.parametrize("position", [None, 3])
def test_what_is_no_position_at_all_is_refused(position: Any) -> None:
    with pytest.raises(IncompatibleError, match="no position of an ElasticSampler"):
        ElasticSampler(8, global_batch=2).load_state_dict(position)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 9}, "dataset of 9 samples and this one has 8"),
        ({"epoch": -1}, "no position"),
        ({"consumed": 2.0}, "no position"),
        ({"seed": None}, "no position"),
        ({"consumed": 9}, "does not fit"),
        ({"shuffle": False}, "does not fit"),
    ],
)
def test_a_position_in_other_data_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = ElasticSampler(8, global_batch=2)
    take(sampler, 3)
    before = sampler.state_dict()
    with pytest.raises(IncompatibleError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 8, "global_batch": 0}, "at least 1"),
        ({"length": 8, "global_batch": 9}, "drop_last=False"),
        ({"length": 0, "global_batch": 1, "drop_last": False}, "0 samples"),
        ({"length": 8, "global_batch": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ElasticSampler(arguments.pop("length"), **arguments)


def test_a_dataset_is_not_its_length() -> None:
    with pytest.raises(UsageError, match=r"not a Numbers: give it len\(dataset\)"):
        ElasticSampler(Numbers(8), global_batch=2)  # type: ignore[arg-type]
    assert ElasticSampler(np.int64(8), global_batch=2).length == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 2, "rank": 0, "world_size": 3}, "2 samples has none for some of 3"),
        ({"global_batch": 4, "rank": 0, "world_size": 3, "drop_last": False}, "drop_last=True"),
        ({"global_batch": 4, "rank": 3, "world_size": 3}, "no rank 3 among 3"),
    ],
)
def test_a_rank_without_samples_is_refused_before_the_epoch(
    options: dict[str, Any], message: str
) -> None:
    sampler = ElasticSampler(9, **options)
    with pytest.raises(UsageError, match=message):
        next(iter(sampler))
    with pytest.raises(UsageError, match=message):
        next(sampler.batches(loader_of(sampler)))


def test_without_a_process_group_there_is_one_rank() -> None:
    assert next(iter(ElasticSampler(4, global_batch=4, shuffle=False))) == [0, 1, 2, 3]
