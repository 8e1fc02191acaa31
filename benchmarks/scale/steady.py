"""A save whose plan is there, on rank 0 and on another: `python -m benchmarks.scale.steady`.

What the ranks would say is made first; then the real agreement reads it, and the real commit makes
root and manifest of what they report. What a rank does itself is done with a state of as many
tensors as the job has, of a few elements each.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from benchmarks.measure import in_own_process, peak_mib, say
from benchmarks.scale.index import notes_of, parameters, segment, structure
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.segments import encode_segment
from dist_ckpt.options import SaveOptions
from dist_ckpt.planning.describe import Describer
from dist_ckpt.planning.files import IndexPlan
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import pack
from dist_ckpt.repository import Repository
from dist_ckpt.saving.agreement import Agreement
from dist_ckpt.saving.attempt import Commit
from dist_ckpt.saving.messages import PlanRequest, Report
from dist_ckpt.saving.snapshot import take_snapshot
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore

RANKS = (64, 1024, 16_384)
SECONDS_TARGET = 1.0
MIB_TARGET = 300.0
RANK_TARGET = 0.05
BYTES_TARGET = 1024.0

_REPEATS = 5
_URL = "s3://bucket/experiments/run"


@dataclass(frozen=True, slots=True)
class Row:
    """What one save of a known structure costs.

    Attributes:
        ranks: of the job.
        seconds: of processor time on rank 0.
        mib: of memory at its peak there, above what the messages took.
        nbytes: that pass rank 0 for each rank, both ways.
        rank_seconds: of processor time on any rank, before its share is copied.
    """

    ranks: int
    seconds: float
    mib: float
    nbytes: float
    rank_seconds: float

    @property
    def is_met(self) -> bool:
        """Whether all is within its bound."""
        return (
            self.seconds <= SECONDS_TARGET
            and self.mib <= MIB_TARGET
            and self.nbytes <= BYTES_TARGET
            and self.rank_seconds <= RANK_TARGET
        )


def measure(ranks: int) -> Row:
    """Save once more with so many ranks."""
    rng = random.Random(ranks)
    of = structure(ranks)
    mine = segment(of, 0, rng)
    requests = [
        pack(
            PlanRequest(
                1000, _URL, 1, "0" * 16, {0: "0" * 16}, {0: b"h" + bytes(8)}, SaveOptions().alike()
            )
        )
        for _ in range(ranks)
    ]
    inside = encode_segment(mine)
    notes = notes_of(ranks, segment(of, ranks - 1, rng), rng)
    notes[0] = msgspec.structs.replace(notes[0], nbytes=len(inside))
    reports = [
        pack(Report(note, 1, rng.uniform(0.1, 0.2), 2.5, f"node-{note.rank // 8:05d}"))
        for note in notes
    ]
    store = MemoryStore(f"bench-steady-{ranks}")
    job = Job(store, timeout_seconds=600)
    claim = Repository(store).claim()
    transaction = Repository(store).begin(1000, claim)
    planner = Agreement(job.training)
    planner.number = 1
    commit = Commit(
        transaction, job, 1, IndexPlan(structure_format.encode(of), ()),
        lambda: inside, ["model", "optimizer"], {"loss": 2.5}, {}, None,
        lambda: None,
    )  # fmt: skip
    before, begun = peak_mib(), time.process_time()
    answer = planner.answer(requests, lambda _: transaction.save_id)
    commit.decide(reports)
    seconds = time.process_time() - begun
    mib = peak_mib() - before
    told = sum(map(len, requests)) + sum(map(len, reports)) + ranks * len(answer)
    return Row(ranks, seconds, mib, told / ranks, _rank_seconds(ranks))


def _rank_seconds(world_size: int) -> float:
    """Return what it takes a rank to find that it holds what it held; the least of some times."""
    names = [name for name, _ in parameters()]
    model = {name: torch.zeros(4, dtype=torch.bfloat16) for name in names}
    moments = {
        f"state.{name}.{kind}": torch.zeros(4) for name in names for kind in ("exp_avg", "sq")
    }
    state = TrainState(rng=None, model=model, optimizer=moments, progress={"step": 1})
    describer, found = Describer(), []
    for _ in range(_REPEATS + 1):
        begun = time.process_time()
        take_snapshot(state, world_size=world_size, describer=describer)
        found.append(time.process_time() - begun)
    return min(found[1:])


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print a row for each number of ranks, and return them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    found: list[Row] = []
    say("| ranks | CPU s, rank 0 | MiB, rank 0 | B a rank | CPU ms, a rank | |")
    say("|---|---|---|---|---|---|")
    for ranks in sorted(parser.parse_args(arguments).ranks):
        row = in_own_process(measure, ranks)
        found.append(row)
        say(
            f"| {row.ranks} | {row.seconds:.3f} | {row.mib:.0f} | {row.nbytes:.0f} | "
            f"{1000 * row.rank_seconds:.1f} | {'met' if row.is_met else 'MISSED'} |"
        )
    return found


if __name__ == "__main__":
    sys.exit(sum(not row.is_met for row in rows(sys.argv[1:])))
