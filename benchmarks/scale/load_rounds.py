"""What real loads say through rank 0: `python -m benchmarks.scale.load_rounds`.

Each rank is a process, so there are as many as one machine holds. The rounds of a load are the same
for any number of ranks, and what is said in them grows with the ranks at most: each row tells.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import dist_ckpt
from benchmarks.measure import say
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.rounds import Deadline, Decide, Topic
from dist_ckpt.testing.ranks import run_ranks

RANKS = (2, 4, 8, 16, 32)
ROUNDS_TARGET = 6
BYTES_TARGET = 2048.0

Rounds = list[tuple[str, int]]
"""Phase, and bytes of the message and of the answer, of each round of one rank."""

# A sixth of what there is to read, so there are several windows.
_IN_FLIGHT_BYTES = 4 << 20
_TENSORS, _ELEMENTS = 600, 6_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """What a load says through rank 0.

    Attributes:
        what: the load.
        ranks: that make it.
        rounds: that each of them takes part in.
        nbytes: of all messages and answers, for each rank.
    """

    what: str
    ranks: int
    rounds: int
    nbytes: float

    @property
    def is_met(self) -> bool:
        """Whether all is within its bound."""
        return self.rounds <= ROUNDS_TARGET and self.nbytes <= BYTES_TARGET


def counted(work: Callable[[], object]) -> Rounds:
    """Do `work`, and return the rounds that this rank took part in."""
    rounds: Rounds = []
    original = JobCoordinator.round

    def counting(
        self: JobCoordinator,
        topic: Topic,
        message: bytes | BaseException,
        decide: Decide,
        *,
        deadline: Deadline,
    ) -> bytes:
        answer = original(self, topic, message, decide, deadline=deadline)
        assert isinstance(message, bytes), message
        rounds.append((topic.key.rpartition("/")[2], len(message) + len(answer)))
        return answer

    with mock.patch.object(JobCoordinator, "round", counting):
        work()
    return rounds


def _state() -> dict[str, Any]:
    rows = _ELEMENTS // _TENSORS // 1000
    return {"weights": {f"layers.{n}": torch.ones(rows, 1000) for n in range(_TENSORS)}}


def _load(root: str) -> dict[str, Rounds]:
    found: dict[str, Rounds] = {}
    state = _state()
    dist_ckpt.save(state, root, step=1)
    for what, exchange in (("each rank reads", "never"), ("read once, sent on", "always")):

        def load(exchange: Any = exchange) -> None:
            dist_ckpt.load(state, root, exchange=exchange, in_flight_bytes=_IN_FLIGHT_BYTES)

        found[f"load, {what}"] = counted(load)
    with dist_ckpt.Checkpointer(root, state, every_steps=100) as ckpt:
        found["restore"] = counted(lambda: ckpt.restore(in_flight_bytes=_IN_FLIGHT_BYTES))
    return found


def measure(ranks: int) -> list[Row]:
    """Have so many ranks save, and load in each way."""
    with tempfile.TemporaryDirectory() as root:
        results = run_ranks(ranks, _load, root)
    return [
        Row(
            what,
            ranks,
            max(len(result[what]) for result in results),
            sum(nbytes for result in results for _, nbytes in result[what]) / ranks,
        )
        for what in results[0]
    ]


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print a row for each number of ranks and way to load, and return them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    found: list[Row] = []
    say("| what | ranks | rounds | B through rank 0, a rank | |")
    say("|---|---|---|---|---|")
    for ranks in sorted(parser.parse_args(arguments).ranks):
        for row in measure(ranks):
            found.append(row)
            say(
                f"| {row.what} | {row.ranks} | {row.rounds} | {row.nbytes:,.0f} | "
                f"{'met' if row.is_met else 'MISSED'} |"
            )
    return found


if __name__ == "__main__":
    sys.exit(sum(not row.is_met for row in rows(sys.argv[1:])))
