"""Saves of several ranks: what each copies and writes, and what they say to one another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.measure import no_warnings
from benchmarks.workload import State
from dist_ckpt import Checkpointer, TrainState, events
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.rounds import Topic
from dist_ckpt.testing.ranks import run_ranks

RANKS = 4

_STEADY_FROM = 2
_SAVES = 20


@dataclass(frozen=True, slots=True)
class Shares:
    """The largest share that a rank has of a state that all ranks hold alike.

    Attributes:
        staged: of what it copied, 1.0 for all of the state.
        written: of what it wrote.
    """

    staged: float
    written: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the ranks exchange in a steady save.

    Attributes:
        nbytes: sent and received by all of them together.
        seconds: of the round that begins the save, from when the last rank had come.
    """

    nbytes: int
    seconds: float


def shares(place: Path, scale: float) -> dict[str, Shares]:
    """Return the shares of four ranks under DDP, of this package and of stock."""
    results = run_ranks(RANKS, _share_of_rank, str(place), scale, timeout_seconds=300)
    nbytes = results[0][0]
    ours = [staged / nbytes for _, staged, _, _ in results]
    written = [count / nbytes for _, _, count, _ in results]
    stock = [staged / nbytes for _, _, _, staged in results]
    files = [
        sum(path.stat().st_size for path in (place / "stock").glob(f"__{rank}_*")) / nbytes
        for rank in range(RANKS)
    ]
    return {
        "dist_ckpt": Shares(max(ours), max(written)),
        "torch DCP async_save": Shares(max(stock), max(files)),
    }


def exchange(place: Path, tensors: int) -> Exchange:
    """Return what four ranks exchange in a steady save of `tensors` tensors."""
    by_rank = run_ranks(RANKS, _exchange_of_rank, str(place), tensors, timeout_seconds=300)
    steady = list(zip(*by_rank, strict=True))[_STEADY_FROM:]
    return Exchange(
        nbytes=round(median(sum(nbytes for nbytes, _ in save) for save in steady)),
        # They come together, and the one that comes last waits for nobody.
        seconds=median(min(seconds for _, seconds in save) for save in steady),
    )


def _share_of_rank(place: str, scale: float) -> tuple[int, int, int, int]:
    """Save the same state on every rank, both ways; return bytes: all, and those of this rank."""
    state = State(scale)
    staged, written = [0], [0]

    def listen(event: events.Event) -> None:
        if isinstance(event, events.SaveStaged):
            staged[0] += event.nbytes
        if isinstance(event, events.FileWritten):
            written[0] += event.nbytes

    stop = events.subscribe(listen)
    parts = TrainState(model=state.model, optimizer=state.optimizer, rng=None)
    with Checkpointer(f"{place}/ours", parts) as checkpointer:
        checkpointer.save(1).wait()
    stop()
    stager = _Counting()
    with no_warnings():
        saved = async_save(state.state_dict(), checkpoint_id=f"{place}/stock", async_stager=stager)
        saved.result()  # type: ignore[union-attr]  # a response only where staging is asynchronous
    stager.close()
    return state.nbytes, staged[0], written[0], stager.nbytes


class _Counting(DefaultStager):
    """The stager of stock, which also counts what it copied."""

    def __init__(self) -> None:
        super().__init__(StagingOptions(False, False, False, False))
        self.nbytes = 0

    def stage(self, state_dict: Any, **kwargs: Any) -> Any:
        staged = super().stage(state_dict, **kwargs)
        self.nbytes += sum(each.nbytes for each in _tensors(staged))
        return staged


def _tensors(value: object) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)


def _exchange_of_rank(place: str, tensors: int) -> list[tuple[int, float]]:
    """Save a state of `tensors` tensors and a fixed size; return bytes and seconds by save."""
    numbers = 15_000_000 // 4 // tensors
    model = nn.ParameterList(torch.full((numbers,), float(i)) for i in range(tensors))
    nbytes, seconds = [0], [0.0]

    def counted(inner: Callable[..., bytes]) -> Callable[..., bytes]:
        def round_(self: JobCoordinator, topic: Topic, sent: Any, *rest: Any, **n: Any) -> bytes:
            planning = topic.key.endswith("/plan")
            if planning:
                dist.barrier()  # ranks that still describe their state would be waited for
            begun = time.perf_counter()
            answer = inner(self, topic, sent, *rest, **n)
            if planning:
                seconds[0] += time.perf_counter() - begun
            nbytes[0] += len(sent) + len(answer)
            return answer

        return round_

    JobCoordinator.round = counted(JobCoordinator.round)  # type: ignore[method-assign]
    found: list[tuple[int, float]] = []
    with Checkpointer(place, TrainState(model=model, rng=None)) as checkpointer:
        for number in range(_SAVES):
            nbytes[0], seconds[0] = 0, 0.0
            checkpointer.save(number).wait()
            found.append((nbytes[0], seconds[0]))
    return found
