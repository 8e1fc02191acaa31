"""A resumed run cannot be told from one that was never interrupted, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from dist_ckpt.testing.ranks import run_ranks
from tests.stateful.training import Recipe, read_log, train

LAYOUTS = ("plain", "ddp", "fsdp2")
OPTIMIZERS = ("adamw", "sgd", "fused")
SCHEDULES = ("one_cycle", "cosine")

# Each layout, optimizer and schedule at least once; the rest of the grid is soaked.
COVERING = [
    Recipe("plain", "fused", "cosine"),
    Recipe("ddp", "adamw", "one_cycle"),
    Recipe("fsdp2", "sgd", "cosine"),
    Recipe("fsdp2", "adamw", "one_cycle"),
]
GRID = [Recipe(*each) for each in product(LAYOUTS, OPTIMIZERS, SCHEDULES)]

ONCE, FIVE_TIMES = (13,), (4, 13, 17, 22, 28)


def label(recipe: Recipe) -> str:
    return f"{recipe.layout}-{recipe.optimizer}-{recipe.schedule}"


def check(tmp_path: Path, recipe: Recipe, kills: tuple[int, ...]) -> None:
    logs = [tmp_path / name for name in ("whole", "resumed")]
    for log in logs:
        log.mkdir()
    run_ranks(recipe.ranks, train, str(tmp_path / "a"), str(logs[0]), recipe, None)
    for kill in kills:
        everyone = range(recipe.ranks)
        arguments = (str(tmp_path / "b"), str(logs[1]), recipe, kill)
        run_ranks(recipe.ranks, train, *arguments, expect_killed=everyone)
    run_ranks(recipe.ranks, train, str(tmp_path / "b"), str(logs[1]), recipe, None)
    whole, resumed = map(read_log, logs)
    assert resumed == whole
    assert len(whole["rank0"]) == 31


@pytest.mark.parametrize("recipe", COVERING, ids=label)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, recipe: Recipe) -> None:
    check(tmp_path, recipe, ONCE)


@pytest.mark.parametrize("recipe", COVERING[:1], ids=label)
def test_five_interruptions_leave_no_trace(tmp_path: Path, recipe: Recipe) -> None:
    check(tmp_path, recipe, FIVE_TIMES)


@pytest.mark.soak
@pytest.mark.parametrize("kills", [ONCE, FIVE_TIMES], ids=["once", "five-times"])
@pytest.mark.parametrize("recipe", GRID, ids=label)
def test_the_whole_grid(tmp_path: Path, recipe: Recipe, kills: tuple[int, ...]) -> None:
    check(tmp_path, recipe, kills)
