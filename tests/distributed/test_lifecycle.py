"""The first and the last save of several ranks: one decision, and nobody waits for who has gone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt import Checkpointer, policy
from dist_ckpt.errors import CheckpointError, CoordinationError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.testing.ranks import run_ranks

WORLD = 2
# Far longer than the test may take: whoever waits for it, hangs.
TIMEOUT_SECONDS = 1800.0


def state(step: int) -> dict[str, Any]:
    return {"weights": {"w": torch.full((8,), float(step))}, "rank": dist_ckpt.PerRank(step)}


def steps(root: str | Path) -> list[int]:
    return Repository(resolve(root)).steps()


def train(root: str, total: int) -> None:
    values = state(0)
    with Checkpointer(root, values, every_steps=5, timeout_seconds=600) as ckpt:
        for step in range(ckpt.restore() + 1, total + 1):
            values["weights"]["w"].fill_(step)
            ckpt.step(step, metrics={"n": step})
        if ckpt.restored is not None:
            ckpt.save(total)  # the newest one, which is done


def test_the_last_step_is_saved_by_all_and_a_finished_job_ends_well(tmp_path: Path) -> None:
    run_ranks(WORLD, train, str(tmp_path), 7)
    assert steps(tmp_path) == [5, 7]
    run_ranks(WORLD, train, str(tmp_path), 7)
    assert steps(tmp_path) == [5, 7]
    loaded = {"weights": {"w": torch.zeros(8)}}
    dist_ckpt.load(loaded, str(tmp_path), skip=["rank", "rng"])
    assert loaded["weights"]["w"].tolist() == [7.0] * 8


def keep_the_last_on_rank_0_alone(root: str, every: int) -> str:
    ckpt = Checkpointer(
        root,
        state(0),
        every_steps=every,
        save_last=dist.get_rank() == 0,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    with pytest.raises(UsageError) as caught, ckpt:
        ckpt.restore()
        for step in range(1, 8):
            ckpt.step(step)
    return str(caught.value)


def test_a_last_save_that_only_some_ranks_want_is_told_at_the_first(tmp_path: Path) -> None:
    told = run_ranks(WORLD, keep_the_last_on_rank_0_alone, str(tmp_path), 5)
    assert told[0] == told[1]
    assert "save_last is True on rank 0 and False on rank 1" in told[0]
    assert steps(tmp_path) == []


def fail_on(rank: int, root: str, restores: bool) -> str:
    """Let one rank end by an exception after the last step, when the others are closing."""
    logging.disable(logging.WARNING)
    ckpt = Checkpointer(root, state(0), every_steps=5, timeout_seconds=TIMEOUT_SECONDS)
    try:
        with ckpt:
            if restores:
                ckpt.restore()
            for step in range(1, 8):
                ckpt.step(step)
            if dist.get_rank() == rank:
                raise LookupError("the last evaluation")
    except LookupError as error:
        return str(error)
    except CoordinationError as error:
        return error.ranks[rank]
    return "nothing"


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("restores", [True, False])
def test_an_exception_on_one_rank_holds_up_nobody(
    tmp_path: Path, rank: int, restores: bool
) -> None:
    said = run_ranks(WORLD, fail_on, rank, str(tmp_path), restores)
    assert said[rank] == "the last evaluation"
    assert said[1 - rank] in ("left before", "connection lost")
    assert steps(tmp_path) == [5]


def fail_early(root: str) -> str:
    """Let rank 0, whose word the others wait for, end by an exception in the middle."""
    logging.disable(logging.WARNING)
    when = policy.every(seconds=3600)
    try:
        with Checkpointer(root, state(0), when=when, timeout_seconds=TIMEOUT_SECONDS) as ckpt:
            for step in range(1, 10**6):
                ckpt.step(step)
                if dist.get_rank() == 0 and step == 3:
                    raise LookupError("a bad batch")
    except (LookupError, CoordinationError) as error:
        return str(error)
    return "nothing"


def test_nobody_waits_for_the_word_of_a_rank_0_that_has_ended(tmp_path: Path) -> None:
    said = run_ranks(WORLD, fail_early, str(tmp_path))
    assert said[0] == "a bad batch"
    assert "ended by an error" in said[1] or "connection to rank 0 was lost" in said[1]


def forget(root: str) -> tuple[str, str]:
    with (
        Checkpointer(root, state(0), every_steps=5, timeout_seconds=600, save_last=False) as ckpt,
        pytest.raises(UsageError) as caught,
    ):
        for step in range(1, 30):
            ckpt.step(step)
    with Checkpointer(root, state(0), when=policy.every(5), timeout_seconds=600) as ckpt:
        with pytest.raises(UsageError) as back:
            ckpt.restore(step=5)
        assert ckpt.restore(step=5, discard_newer=True) == 5
        for step in range(6, 13):
            ckpt.step(step)
    return str(caught.value), str(back.value)


def test_all_ranks_are_refused_alike_and_go_back_together(tmp_path: Path) -> None:
    run_ranks(WORLD, train, str(tmp_path), 17)
    assert steps(tmp_path) == [5, 10, 15, 17]
    said = run_ranks(WORLD, forget, str(tmp_path))
    assert said[0] == said[1]
    assert "was not called" in said[0][0]
    assert "newer than step 5 (10, 15, 17)" in said[0][1]
    assert steps(tmp_path) == [5, 10, 12]


def look(root: str) -> tuple[int, int, str]:
    live = state(0)
    report = dist_ckpt.load(live, root, step="best", metric="n", mode="max", timeout_seconds=600)
    copy = dist_ckpt.load(live, f"{root}-copied", timeout_seconds=600)
    error = ""
    try:
        # What is asked for differs: the ranks must not load different things.
        metric = "n" if dist.get_rank() == 0 else "m"
        dist_ckpt.load(live, root, step="best", metric=metric, timeout_seconds=600)
    except CheckpointError as found:
        error = str(found)
    return report.step, copy.step, error


def test_all_ranks_look_at_the_same_one_and_take_nothing_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(WORLD, train, str(run), 7)
    (run / "step-0000000005").rename(tmp_path / "run-copied")
    before = sorted(run.rglob("*"))
    said = run_ranks(WORLD, look, str(run))
    assert [each[:2] for each in said] == [(7, 5)] * WORLD
    assert all("best is lowest n on rank 0 and lowest m on rank 1" in error for *_, error in said)
    assert sorted(run.rglob("*")) == before


def nothing_in_common(root: str) -> str:
    plain = torch.nn.Linear(2, 2, bias=False)
    other = torch.nn.ParameterDict({"other": torch.zeros(2, 2)})
    live = {"model": plain if dist.get_rank() == 0 else other}
    dist_ckpt.load(live, root, strict=False, timeout_seconds=600)  # one rank has a partner
    with pytest.raises(CheckpointError) as caught:
        dist_ckpt.load({"model": other}, root, strict=False, timeout_seconds=600)
    return str(caught.value)


def test_what_no_rank_has_a_name_in_common_with_is_an_error_on_all(tmp_path: Path) -> None:
    dist_ckpt.save({"model": torch.nn.Linear(2, 2, bias=False)}, tmp_path)
    said = run_ranks(WORLD, nothing_in_common, str(tmp_path))
    assert said[0] == said[1]
    assert "have not one name in common" in said[0]
