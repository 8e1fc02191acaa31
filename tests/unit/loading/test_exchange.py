"""What crosses between ranks: all there is to say once, and next to nothing after that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Coordinators, Deadline, Decide, Topic
from dist_ckpt.repository import Repository
from dist_ckpt.saving.saver import Saver
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.ranks.rounds import links, on_every_rank

WORLD = 4
_names = itertools.count()


class Counting(JobCoordinator):
    """Counts the bytes of what it sends and of what it is answered."""

    counts: dict[str, int]

    def round(
        self, topic: Topic, message: bytes | BaseException, decide: Decide, *, deadline: Deadline
    ) -> bytes:
        assert isinstance(message, bytes), message
        answer = super().round(topic, message, decide, deadline=deadline)
        phase = topic.key.rsplit("/", 1)[-1]
        self.counts[phase] = self.counts.get(phase, 0) + len(message) + len(answer)
        return answer


def exchanged(tensors: int) -> tuple[dict[str, int], dict[str, int]]:
    """Save a state of so many tensors twice; return the bytes of each save, by phase of a round."""
    place = MemoryStore(f"unit-exchange-{next(_names)}")
    shared = links(WORLD)
    first: dict[str, int] = {}
    second: dict[str, int] = {}
    members = []

    def rank(number: int) -> Callable[[], None]:
        job = Job(place, timeout_seconds=600)
        mine = [Counting(shared[number]) for _ in range(2)]
        for member in mine:
            member.counts = {}
        members.append(mine)
        job.coordinators = Coordinators(*mine)
        state: dict[str, Any] = {f"layers.{i}": torch.full((3,), float(i)) for i in range(tensors)}
        saver = Saver(job, TrainState(rng=None, weights=state), keep=None, metadata={})

        def work() -> None:
            saver.start(1, {}).wait()
            for member in mine:
                for phase, nbytes in member.counts.items():
                    first[f"{phase} {number}"] = nbytes
                member.counts = {}
            state["layers.0"].fill_(-1)
            saver.start(2, {}).wait()
            for member in mine:
                for phase, nbytes in member.counts.items():
                    second[f"{phase} {number}"] = nbytes
            saver.close()

        return work

    for result in on_every_rank([rank(number) for number in range(WORLD)]):
        assert result is None, result
    assert Repository(place).steps() == [1, 2]
    return first, second


def test_a_steady_save_says_the_same_of_many_tensors_as_of_few() -> None:
    first_few, few = exchanged(150)
    first_many, many = exchanged(1500)
    # The first save tells everything once, tensor by tensor, compares replicas, and finds out
    # whether all ranks write to one place.
    phases = {"plan", "describe", "replicas", "token", "sight", "commit"}
    assert {key.split()[0] for key in first_few} == phases
    assert sum(first_many.values()) > 5 * sum(first_few.values())
    # Of ranks alike one sends the names; the numbers of all others take no more than a few pages.
    for rank in range(1, WORLD):
        told = {key: size for key, size in first_many.items() if key.endswith(f" {rank}")}
        assert sum(told.values()) < 2048, told
    assert {key.split()[0] for key in few} == {key.split()[0] for key in many} == {"plan", "commit"}
    # A few digits more: of the sizes of a file and of a segment.
    assert sum(many.values()) <= sum(few.values()) + 32 * WORLD
    assert max(many.values()) < 1024
