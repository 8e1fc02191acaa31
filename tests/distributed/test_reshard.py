"""Any world size and layout to any other, bit for bit: all in `make soak`, two here.

`test_layout_matrix` has every layout at one world size of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks
from tests.distributed.layouts import LAYOUTS, build, problems

SIZES = {"2 and 3": (2, 3), "1 to 4": (1, 2, 3, 4)}


def save_all(root: str, world_size: int) -> None:
    for number, layout in enumerate(LAYOUTS):
        seed = 10 * world_size + number
        dist_ckpt.save(build(layout, seed), f"{root}/{layout}-{world_size}", step=seed)


def load_all(root: str, sizes: tuple[int, ...], left_out: tuple[int, ...]) -> list[str]:
    wrong = []
    for saved_size in sizes:
        if saved_size in left_out:
            continue
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


@pytest.mark.parametrize("sizes", ["2 and 3", pytest.param("1 to 4", marks=pytest.mark.soak)])
def test_every_layout_loads_into_every_other(sizes: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    for world_size in SIZES[sizes]:
        run_ranks(world_size, save_all, root, world_size)
    for world_size in SIZES[sizes]:
        # The same size is what `test_layout_matrix` has.
        left_out = (world_size,) if sizes == "2 and 3" else ()
        results = run_ranks(world_size, load_all, root, SIZES[sizes], left_out)
        for rank, wrong in enumerate(results):
            assert wrong == [], f"on rank {rank} of {world_size}"
