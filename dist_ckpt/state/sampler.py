"""Position in the data: one global order of samples, at any number of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Protocol, SupportsIndex, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, get_worker_info

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.format.names import as_integer

Batch = TypeVar("Batch")

_COUNTS = ("epoch", "consumed", "length", "global_batch", "seed")


class ElasticSampler:
    """A batch sampler whose position is one number, the same at every world size.

    The order of an epoch is one permutation of all samples, given by `seed` and the epoch. A
    step takes the next `global_batch` samples of it, whatever the number of ranks, and each rank
    gets a contiguous piece of those, all of nearly the same length. So a job that continues at
    another world size sees the same global batches, none twice and none left out.

    ```python
    import torch
    from dist_ckpt import ElasticSampler
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(torch.randn(640, 4))
    sampler = ElasticSampler(len(dataset), global_batch=64)
    data = sampler.repeatable(dataset)  # where samples are made with random augmentation
    loader = DataLoader(data, batch_sampler=sampler)
    for step, batch in zip(range(1, 16), sampler.batches(loader)):  # the batches never end
        loss = batch[0].square().mean()
    ```

    `batches` counts a batch as seen when it hands it to the loop; what workers hold in advance
    is not counted and is loaded again after a resume. A loader that is iterated directly does
    not tell what the loop has seen, and `state_dict` then refuses.

    Random numbers: starting a DataLoader draws the base seed of its workers, from the loader's
    `generator` if it has one and from torch's global generator if not. `batches` keeps that draw
    away from the global generator: there it comes from `seed`, the epoch, the position and the
    rank, so the numbers that the training loop draws are the same whether or not it was resumed
    in the middle of an epoch. What workers themselves draw starts anew with each start of the
    loader, unless they draw from the dataset that `repeatable` returns.

    Args:
        length: samples in the dataset.
        global_batch: samples of one step over all ranks, at least one for each rank.
        rank: this rank; None takes it from the process group at first use, 0 if there is none.
        world_size: ranks; None likewise, 1 if there is no process group.
        seed: of the permutations; a restore brings the stored one.
        shuffle: False keeps the order of the dataset.
        drop_last: leave out the samples at the end of an epoch that do not fill a global batch.

    Raises:
        UsageError: an argument out of range, or an epoch without a single batch.
    """

    def __init__(
        self,
        length: SupportsIndex,
        *,
        global_batch: SupportsIndex,
        rank: SupportsIndex | None = None,
        world_size: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        # Of numpy they would be stored so, and be no position any more.
        samples = as_integer(length)
        if samples is None:
            raise UsageError(
                f"ElasticSampler takes the number of samples, not a {type(length).__qualname__}: "
                "give it len(dataset)"
            )
        global_batch = _whole("global_batch", global_batch)
        seed = _whole("seed", seed)
        for argument, switch in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(switch, bool):
                raise UsageError(f"{argument} is True or False, not {switch!r}")
        if global_batch < 1:
            raise UsageError(f"global_batch is {global_batch}: must be at least 1")
        if samples < (global_batch if drop_last else 1):
            raise UsageError(
                f"{samples} samples make no batch of {global_batch}: lower global_batch"
                + (", or pass drop_last=False" if drop_last else "")
            )
        if seed < 0:
            raise UsageError(f"seed is {seed}: must not be negative")
        self.length = samples
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._rank = None if rank is None else _whole("rank", rank)
        self._world_size = None if world_size is None else _whole("world_size", world_size)
        self._epoch = 0
        self._consumed = 0
        self._repeatable = False
        self._restores = 0  # how often the position was moved from outside
        # Which of the two asked for index lists: the loader inside `batches`, or somebody else.
        self._in_batches = False
        self._started_here = False
        self._started_elsewhere = False

    @property
    def epoch(self) -> int:
        """The epoch of the batch handed out last, from 0; before any, of the first to come."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Samples of this epoch that all ranks together have been handed."""
        return self._consumed

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return (self._end(0) + self.global_batch - 1) // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        """Return this rank's index lists from the position on, to the end of the epoch."""
        # A plain method, not a generator: the loader may take its first index much later.
        if self._in_batches:
            self._started_here = True
        else:
            self._started_elsewhere = True
        return self._index_lists(self._consumed)

    def repeatable(self, dataset: Indexed[Any]) -> Repeatable:
        """Return `dataset` such that its random augmentation repeats exactly.

        The randomness of a sample then comes from `seed`, the epoch and the sample's index alone:
        neither a resume nor another number of workers or ranks changes it. It works with the global
        generators of Python, numpy and torch.

        Args:
            dataset: the samples, by index; the loader is to draw from what is returned.

        Raises:
            UsageError: it has another length than this sampler was made for.
        """
        if len(dataset) != self.length:
            raise UsageError(
                f"the dataset has {len(dataset)} samples, and the sampler is for {self.length}"
            )
        self._repeatable = True
        return Repeatable(dataset)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of `loader`, which draws from this sampler, epoch after epoch.

        Each start takes up the position where it is. A `load_state_dict` inside the loop moves
        it, and the next batch is from there.

        Raises:
            UsageError: `loader` does not draw from this sampler, or ends with its first epoch, as
                a generator does.
        """
        self._started_elsewhere = False
        while True:
            # Turned over here and not at the last batch, so that a save after it says "all of this
            # epoch" and no state has two spellings.
            if self._consumed == self._end(self._consumed):
                self._epoch += 1
                self._consumed = 0
            restores = self._restores
            handed = False
            for batch in self._one_start(loader):
                handed = True
                # Before the loop has it: a save inside the loop's body counts this batch.
                self._consumed += min(self.global_batch, self.length - self._consumed)
                yield batch
                if restores != self._restores:
                    break  # what the loader holds in advance is from the old position
            if not handed:
                # Each start has a batch: without one the next starts would go round for ever.
                raise UsageError(
                    f"the loader gave no batch of epoch {self._epoch}, where samples are left: a "
                    "generator or an iterator ends once. Give batches() what can be iterated anew, "
                    "such as the DataLoader, and change its batches in the loop"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the same on every rank.

        Raises:
            UsageError: the loader was iterated directly, so the position is not known.
        """
        if self._started_elsewhere:
            raise UsageError(
                "the loader was iterated directly, so this sampler does not know which batches "
                "were used: write `for batch in sampler.batches(loader)`"
            )
        return {
            "epoch": self._epoch,
            "consumed": self._consumed,
            "length": self.length,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take a position. Another `global_batch` continues behind the samples already seen.

        Raises:
            IncompatibleError: it is not a position in these samples in this order.
        """
        self.check_state_dict(state)
        # The stored seed too: under another one the rest of the epoch would be another set.
        self._epoch = state["epoch"]
        self._consumed = state["consumed"]
        self.seed = state["seed"]
        self._restores += 1
        self._started_elsewhere = False

    def check_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Check that `load_state_dict` would take `state`; changes nothing.

        Raises:
            IncompatibleError: it is not a position in these samples in this order.
        """
        if not isinstance(state, Mapping):
            raise IncompatibleError(f"no position of an ElasticSampler: {state!r}")
        counts = [state.get(key) for key in _COUNTS]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise IncompatibleError(f"no position of an ElasticSampler: {dict(state)!r}")
        if state["length"] != self.length:
            raise IncompatibleError(
                f"the position is in a dataset of {state['length']} samples and this one has "
                f"{self.length}: load without the sampler to start the data over"
            )
        if state["consumed"] > self.length or state.get("shuffle") is not self.shuffle:
            raise IncompatibleError(
                f"the position {dict(state)!r} does not fit a sampler with shuffle={self.shuffle}"
            )

    def _one_start(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        self._started_here = False
        # CPU only: a DataLoader draws nothing from a device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._start_seed())
            iterator = self._here(iter, loader)
        end = object()
        while (batch := self._here(next, iterator, end)) is not end:
            # Only now: a loader may be a generator that starts at its first batch.
            if not self._started_here:
                raise UsageError(
                    "the loader does not draw from this sampler, or was begun before: build it "
                    "with DataLoader(dataset, batch_sampler=sampler), and give that, not an "
                    "iterator of it"
                )
            yield batch

    def _here(self, call: Any, *args: Any) -> Any:
        # Only while the loader runs: an iteration in the loop's body is a direct one.
        self._in_batches = True
        try:
            return call(*args)
        finally:
            self._in_batches = False

    def _index_lists(self, start: int) -> Iterator[list[int]]:
        rank, world_size = self._place()
        # Checked for the last batch of the epoch before the first one is handed out.
        end = self._end(start)
        smallest = (end - start) % self.global_batch or self.global_batch
        if smallest < world_size:
            raise UsageError(
                f"a batch of {smallest} samples has none for some of {world_size} ranks: raise "
                "global_batch, or pass drop_last=True if it is the last one of the epoch"
            )
        order, origin = self._order(), self._hash("sample")
        for first in range(start, end, self.global_batch):
            stop = min(first + self.global_batch, end)
            # The first ranks take one more; every rank can say so without asking another.
            share, extra = divmod(stop - first, world_size)
            low = first + rank * share + min(rank, extra)
            indices = order[low : low + share + (rank < extra)].tolist()
            yield [seeded(i, origin) for i in indices] if self._repeatable else indices

    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self.shuffle:
            return np.arange(self.length, dtype=np.int64)
        # RandomState is frozen by numpy's promise; newer generators may change their streams.
        # Its seed is a hash, so (seed, epoch) and (seed + 1, epoch - 1) have nothing in common.
        source = np.random.RandomState(np.frombuffer(self._hash("order"), dtype="<u4"))
        return source.permutation(self.length).astype(np.int64, copy=False)

    def _end(self, start: int) -> int:
        """Return where an epoch that goes on at `start` ends."""
        left = self.length - start
        return start + left - (left % self.global_batch if self.drop_last else 0)

    def _place(self) -> tuple[int, int]:
        grouped = dist.is_available() and dist.is_initialized()
        # At first use: the sampler may be built before the process group.
        if self._rank is None:
            self._rank = dist.get_rank() if grouped else 0
        if self._world_size is None:
            self._world_size = dist.get_world_size() if grouped else 1
        if not 0 <= self._rank < self._world_size:
            raise UsageError(f"there is no rank {self._rank} among {self._world_size}")
        return self._rank, self._world_size

    def _start_seed(self) -> int:
        where = f"start/{self._consumed}/{self._place()[0]}"
        return int.from_bytes(self._hash(where)[:8], "little") >> 1

    def _hash(self, purpose: str) -> bytes:
        text = f"{purpose}/{self.seed}/{self._epoch}"
        return blake2b(text.encode(), digest_size=32).digest()


# Randomness of samples that does not depend on which worker made them, or since when it runs.


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


def _whole(argument: str, value: SupportsIndex) -> int:
    number = as_integer(value)
    if number is None:
        raise UsageError(f"{argument} is an integer, not {value!r}")
    return number


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
