"""Any world size and layout to any other, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks
from tests.distributed.layouts import LAYOUTS, build, problems

SIZES = (1, 2, 3, 4)


def save_all(root: str, world_size: int) -> None:
    for number, layout in enumerate(LAYOUTS):
        seed = 10 * world_size + number
        dist_ckpt.save(build(layout, seed), f"{root}/{layout}-{world_size}", step=seed)


def load_all(root: str) -> list[str]:
    wrong = []
    for saved_size in SIZES:
        for number, saved_layout in enumerate(LAYOUTS):
            for layout in LAYOUTS:
                state = build(layout, None)
                report = dist_ckpt.load(state, f"{root}/{saved_layout}-{saved_size}")
                seed = 10 * saved_size + number
                assert report.step == seed
                assert report.saved_world_size == saved_size
                found = problems(state, seed)
                wrong += [f"{saved_layout}-{saved_size} into {layout}: {name}" for name in found]
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reshard")
    for world_size in SIZES:
        run_ranks(world_size, save_all, str(root), world_size)
    return root


@pytest.mark.parametrize("world_size", SIZES)
def test_every_layout_loads_into_every_other_at(world_size: int, saved: Path) -> None:
    for rank, wrong in enumerate(run_ranks(world_size, load_all, str(saved))):
        assert wrong == [], f"on rank {rank}"
