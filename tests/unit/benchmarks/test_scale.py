"""The quick form of `make bench-scale`: what it measures of large jobs does not bend upwards.

Counts are compared as they are; processor time as the ratio of two sizes in one process, with room
for whatever else the machine does. That rounds stay at two frames a rank is seen in
`tests/unit/ranks/test_many_ranks.py`, that a load stays at six rounds in
`tests/distributed/test_load_rounds.py`, and how large an index becomes in `test_index.py`.
"""

from __future__ import annotations

import pytest

from benchmarks.scale import loads, requests, steady
from benchmarks.scale.jobs import JOBS
from benchmarks.scale.planning import measure
from benchmarks.scale.report import BYTES_TARGET
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.saving.agreement import put_together
from dist_ckpt.saving.messages import Description
from dist_ckpt.storage.memory import MemoryStore

FEW, MANY = 16, 256
GROUPS = 8
# Twice as much as if every rank cost the same: it is a third of that, and a square would be 256.
MOST_TIMES_THE_SECONDS = 2 * MANY / FEW
MOST_BYTES_A_RANK = 1 << 10

NUMBERS = [number for number, job in enumerate(JOBS) if job.layout != "moe"]


@pytest.mark.parametrize("number", NUMBERS, ids=[JOBS[number].name for number in NUMBERS])
def test_the_first_plan_does_not_bend_upwards(number: int) -> None:
    few, many = measure(number, FEW), measure(number, MANY)
    assert many.boxes == few.boxes * MANY / FEW
    assert many.seconds < MOST_TIMES_THE_SECONDS * few.seconds
    # What a rank says and is told has as many numbers as it has tensors, whoever else there is.
    assert many.tables == few.tables
    assert many.received + many.sent < MOST_BYTES_A_RANK
    assert many.received < 1.5 * few.received
    assert many.sent < 2 * few.sent


def test_of_a_mixture_of_experts_each_way_of_cutting_is_planned_once() -> None:
    """Of 24,000 tensors: cut in a few ways by each group of ranks that has the same ones."""
    (job,) = (each for each in JOBS if each.layout == "moe")
    held = put_together([unpack(each, Description) for each in job.messages(GROUPS)[0]])
    holdings = Holdings.of(held)
    assert len(holdings.tensors) > 24_000
    # Two matrices in two dtypes and their counter, for each of the groups; and those of all ranks.
    assert len(holdings.tiles) < 8 * GROUPS


def test_of_replicas_poured_over_many_ranks_each_is_told_little() -> None:
    """The most that one is told: a matrix has about as many least pieces as there are ranks."""
    (number,) = (number for number, job in enumerate(JOBS) if job.layout == "ddp")
    row = measure(number, 1536)
    # What a first save says besides, it says at each save, which has a bound of its own.
    assert row.received + row.sent < BYTES_TARGET - steady.BYTES_TARGET / 2


def test_a_rank_says_and_is_told_little_of_many_experts() -> None:
    (number,) = (number for number, job in enumerate(JOBS) if job.layout == "moe")
    row = measure(number, GROUPS)
    assert row.received + row.sent < MOST_BYTES_A_RANK


def test_a_save_of_a_known_structure_says_little_for_each_rank() -> None:
    few, many = steady.measure(FEW), steady.measure(MANY)
    assert many.nbytes < few.nbytes + 16
    assert many.nbytes < steady.BYTES_TARGET / 2
    assert many.seconds < steady.SECONDS_TARGET


@pytest.mark.parametrize("factor", loads.FACTORS)
def test_a_load_reads_what_it_wants(factor: float) -> None:
    assert loads.measure(FEW, int(FEW * factor)).read <= loads.READ_TARGET


def test_requests_are_those_of_pages() -> None:
    """Of 1,500 checkpoints, the newest of 2,100 files: two pages, and three."""
    store = requests.AsS3(MemoryStore("unit-scale-requests"))
    found = {row.what: row.requests for row in requests.measure(store, store.asked, 1500, 700)}
    assert found == {"latest": 3, "restore choice": 4, "retention after a commit": 9, "deletion": 9}
