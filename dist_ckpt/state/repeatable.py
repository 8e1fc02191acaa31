"""Randomness of samples that does not depend on which worker made them, or since when it runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from dist_ckpt.errors import UsageError

SampleT = TypeVar("SampleT", covariant=True)


class Indexed(Protocol[SampleT]):
    """A dataset with an order: what a sampler can draw from."""

    def __getitem__(self, index: int, /) -> SampleT:
        """Return a sample."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...


class SeededIndex(int):
    """The position of a sample, with the seed for whatever is random in making it."""

    seed: bytes

    def __new__(cls, index: int, seed: bytes) -> SeededIndex:
        """Return `index`, which is a plain integer to everybody else."""
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple[type[SeededIndex], tuple[int, bytes]]:
        """Keep the seed on the way to a worker."""
        return SeededIndex, (int(self), self.seed)


def seeded(index: int, order: bytes) -> SeededIndex:
    """Return `index` with the seed of that sample in the epoch that `order` stands for."""
    digest = blake2b(order, digest_size=32, person=b"dist_ckpt")
    digest.update(str(index).encode())
    return SeededIndex(index, digest.digest())


class Repeatable(Dataset[Any]):
    """A dataset whose samples come out the same each time they are made in one epoch.

    Before each sample the global generators of Python, numpy and torch are seeded from the
    sampler's seed, the epoch and the sample's index, so that random augmentation does not depend on
    the number of workers, the number of ranks, or where a run was resumed. In the main process
    (`num_workers=0`) they are put back afterwards: the loop draws what it would have drawn.
    """

    def __init__(self, dataset: Indexed[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._dataset)

    def __getitem__(self, index: SeededIndex) -> Any:
        """Return the sample.

        Raises:
            UsageError: the index does not come from the sampler that made this dataset.
        """
        if not isinstance(index, SeededIndex):
            raise UsageError(
                "a repeatable dataset takes its indices from the sampler that made it: build the "
                "loader with DataLoader(sampler.repeatable(dataset), batch_sampler=sampler)"
            )
        if get_worker_info() is not None:  # this process draws for nothing else
            _seed_all(index.seed)
            return self._dataset[int(index)]
        with _put_back():
            _seed_all(index.seed)
            return self._dataset[int(index)]


def _seed_all(seed: bytes) -> None:
    words = np.frombuffer(seed, dtype="<u4").astype(np.uint32)
    random.seed(seed)
    np.random.seed(words)
    # The CPU's alone: samples are made on the CPU, and seeding CUDA would be told to every device.
    torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)


@contextmanager
def _put_back() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
