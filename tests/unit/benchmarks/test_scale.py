"""The quick form of `make bench-scale`: what it measures of large jobs does not bend upwards.

Counts are compared as they are; processor time as the ratio of two sizes in one process, with room
for whatever else the machine does. That rounds stay at two frames a rank is seen in
`tests/unit/ranks/test_many_ranks.py`, that a load stays at six rounds in
`tests/distributed/test_load_rounds.py`, and how large an index becomes in `test_index.py`.
"""

from __future__ import annotations

import pytest

from benchmarks.scale.jobs import JOBS
from benchmarks.scale.planning import measure

FEW, MANY = 16, 256
# Twice as much as if every rank cost the same: it is a third of that, and a square would be 256.
MOST_TIMES_THE_SECONDS = 2 * MANY / FEW
MOST_BYTES_A_RANK = 16 << 10

NUMBERS = [number for number, job in enumerate(JOBS) if job.layout != "moe"]


@pytest.mark.parametrize("number", NUMBERS, ids=[JOBS[number].name for number in NUMBERS])
def test_the_first_plan_does_not_bend_upwards(number: int) -> None:
    few, many = measure(number, FEW), measure(number, MANY)
    assert many.boxes == few.boxes * MANY / FEW
    assert many.seconds < MOST_TIMES_THE_SECONDS * few.seconds
    # What a rank says and is told has as many numbers as it has tensors, whoever else there is.
    assert many.tables == few.tables
    assert max(many.received, many.sent) < MOST_BYTES_A_RANK
    assert many.received < 1.5 * few.received
    assert many.sent < 2 * few.sent
