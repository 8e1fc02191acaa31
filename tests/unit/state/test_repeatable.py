"""Random augmentation that is the same after a resume, with any workers and ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dist_ckpt.errors import UsageError
from dist_ckpt.state.sampler import ElasticSampler


class Noisy:
    """Samples that use every global generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[int, float]:
        noise = random.random() + float(np.random.uniform()) + float(torch.rand(()))
        return index, noise


def take(sampler: ElasticSampler, count: int, workers: int) -> list[tuple[list[int], list[float]]]:
    loader: Any = DataLoader(
        sampler.repeatable(Noisy()), batch_sampler=sampler, num_workers=workers
    )
    seen = []
    for index, noise in sampler.batches(loader):
        seen.append((index.tolist(), noise.tolist()))
        if len(seen) == count:
            break
    return seen


def sampler(rank: int = 0, world_size: int = 1) -> ElasticSampler:
    return ElasticSampler(24, global_batch=4, rank=rank, world_size=world_size)


def test_samples_do_not_depend_on_workers_resumes_or_ranks() -> None:
    whole = take(sampler(), 9, 0)
    assert take(sampler(), 9, 2) == whole
    first, second = sampler(), sampler()
    begun = take(first, 4, 2)
    second.load_state_dict(first.state_dict())
    assert begun + take(second, 5, 1) == whole
    halves = [take(sampler(rank, 2), 9, 0) for rank in range(2)]
    assert [
        (left[0] + right[0], left[1] + right[1]) for left, right in zip(*halves, strict=True)
    ] == whole
    # One sample looks different in each epoch, and no two samples alike.
    values = [noise for _, batch in whole for noise in batch]
    assert len(set(values)) == len(values)


def test_the_training_loop_draws_what_it_would_have_drawn() -> None:
    def draws(count: int) -> list[float]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if count:
            take(sampler(), count, 0)
        return [random.random(), float(np.random.uniform()), float(torch.rand(()))]

    assert draws(3) == draws(0)


def test_plain_indices_and_other_lengths_are_refused() -> None:
    data = sampler().repeatable(Noisy())
    assert len(data) == 24
    with pytest.raises(UsageError, match="takes its indices from the sampler"):
        data[3]  # type: ignore[index]
    with pytest.raises(UsageError, match="24 samples, and the sampler is for 25"):
        ElasticSampler(25, global_batch=5).repeatable(Noisy())
