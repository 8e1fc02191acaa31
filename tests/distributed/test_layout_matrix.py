"""Saved in each layout and loaded in each layout, on a disk and on S3, bit for bit.

`test_reshard` does so on a disk, with fewer kinds of layouts, in every run of the tests.
"""

from __future__ import annotations

import pytest

import dist_ckpt
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.testing.ranks import run_ranks
from tests.distributed.nets import LAYOUTS, build, clear, differences
from tests.services.s3 import S3Service

SIZES = sorted(set(LAYOUTS.values()))
STEPS = {layout: step for step, layout in enumerate(LAYOUTS)}


def of_size(world_size: int) -> list[str]:
    return [layout for layout, size in LAYOUTS.items() if size == world_size]


def save_all(roots: list[str], world_size: int) -> None:
    stores = [resolve(root) for root in roots]  # once: a client of S3 is slow to make
    for layout in of_size(world_size):
        state = build(layout).state
        for store in stores:
            dist_ckpt.save(state, store, step=STEPS[layout])


def load_all(roots: list[str], world_size: int) -> list[str]:
    wrong = []
    stores = [resolve(root) for root in roots]
    for layout in of_size(world_size):
        training, expected = build(layout), build(layout)
        for store in stores:
            for saved, step in STEPS.items():
                clear(training)
                report = dist_ckpt.load(training.state, store, step=step)
                assert (report.verified, report.saved_world_size) == (True, LAYOUTS[saved])
                wrong += [
                    f"{saved} into {layout} from {store.url}: {name}"
                    for name in differences(training, expected)
                ]
    return wrong


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, s3_service: S3Service) -> list[str]:
    """Two places, each with a checkpoint of every layout."""
    places = [str(tmp_path_factory.mktemp("matrix")), s3_service.url("layout-matrix")]
    for world_size in SIZES:
        run_ranks(world_size, save_all, places, world_size)
    return places


@pytest.mark.soak
@pytest.mark.parametrize("world_size", SIZES)
def test_every_layout_takes_what_every_other_saved_at(world_size: int, roots: list[str]) -> None:
    for rank, wrong in enumerate(run_ranks(world_size, load_all, roots, world_size)):
        assert wrong == [], f"on rank {rank}"
