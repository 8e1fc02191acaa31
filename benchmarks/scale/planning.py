"""The first plan of large jobs, on rank 0: `python -m benchmarks.scale.planning`.

What the ranks would send is made first; then the real planner reads it, decides who writes what,
and packs the answer of each rank. Each row has a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import in_own_process, peak_mib, say
from benchmarks.scale.jobs import JOBS
from dist_ckpt.ranks.rounds import pack
from dist_ckpt.saving.agreement import plan_job

RANKS = (64, 1024, 16_384)
SECONDS_TARGET = 60.0
MIB_TARGET = 4096.0


@dataclass(frozen=True, slots=True)
class Row:
    """What one plan cost.

    Attributes:
        job: its name.
        ranks: of the job.
        boxes: that they hold together.
        seconds: of processor time on rank 0.
        mib: of memory at its peak, above what the messages took.
        received: bytes a rank sent, without tables.
        sent: bytes a rank is sent.
        tables: bytes of all tables.
    """

    job: str
    ranks: int
    boxes: int
    seconds: float
    mib: float
    received: float
    sent: float
    tables: int

    def text(self, before: Row | None) -> str:
        """Return the row of the table; `before` is the row of the same job with fewer ranks."""
        exponent = "" if before is None else f"{_exponent(before, self):.2f}"
        cells = (
            self.job,
            self.ranks,
            self.boxes,
            f"{self.seconds:.2f}",
            exponent,
            f"{self.mib:.0f}",
            f"{self.received:.0f}",
            f"{self.sent:.0f}",
            self.tables,
            "met" if self.is_met() else "MISSED",
        )
        return f"| {' | '.join(map(str, cells))} |"

    def is_met(self) -> bool:
        """Whether time and memory are within their bounds."""
        return self.seconds <= SECONDS_TARGET and self.mib <= MIB_TARGET


def measure(number: int, ranks: int) -> Row:
    """Plan the job `number` of `JOBS` with so many ranks."""
    job = JOBS[number]
    messages, tables = job.messages(ranks)
    received = (sum(map(len, messages)) - tables) / ranks
    before, begun = peak_mib(), time.process_time()
    plan = plan_job(messages)
    sent = sum(len(pack(plan.share(rank, 1))) for rank in range(ranks))
    seconds = time.process_time() - begun
    return Row(
        job.name,
        ranks,
        job.boxes(ranks),
        seconds,
        peak_mib() - before,
        received,
        sent / ranks,
        tables,
    )


def _exponent(before: Row, after: Row) -> float:
    return math.log(after.seconds / before.seconds) / math.log(after.ranks / before.ranks)


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print the table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--jobs", type=int, nargs="*", default=range(len(JOBS)))
    chosen = parser.parse_args(arguments)
    say(
        "| job | ranks | boxes | CPU s | exponent | MiB | B in a rank | B out a rank | tables B | |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|")
    found: list[Row] = []
    for number in chosen.jobs:
        before: Row | None = None
        for ranks in sorted(chosen.ranks):
            row = in_own_process(measure, number, ranks)
            say(row.text(before))
            before = row
            found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(sum(not row.is_met() for row in rows(sys.argv[1:])))
