"""Logs and diaries, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.demo_parts.records import (
    Attempt,
    Entry,
    Note,
    RecordError,
    read_diary,
    read_losses,
    read_samples,
    standing,
    undone,
)


def attempt(resumed: int, *steps: int) -> Attempt[str]:
    entries = [Entry(step, f"{step}@{resumed}", 0.0) for step in steps]
    return Attempt(resumed, "ddp", 2, 0.0, entries)


def write(file: Path, *lines: dict[str, object]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_restart_undoes_the_steps_after_the_one_it_resumed_from() -> None:
    attempts = [attempt(0, 1, 2, 3, 4), attempt(2, 3, 4, 5)]
    assert [entry.value for entry in standing(attempts)] == ["1@0", "2@0", "3@2", "4@2", "5@2"]
    assert [entry.value for entry in undone(attempts)] == ["3@0", "4@0"]


def test_a_run_may_begin_behind_a_checkpoint() -> None:
    assert [entry.step for entry in standing([attempt(7, 8, 9)])] == [8, 9]


def test_nothing_stands_in_an_empty_log() -> None:
    assert standing([]) == []
    assert undone([]) == []


@pytest.mark.parametrize("steps", [(2, 3), (1, 3), (1, 1), (1, 2, 1)])
def test_steps_that_do_not_follow_one_another_are_an_error(steps: tuple[int, ...]) -> None:
    with pytest.raises(RecordError, match="should follow"):
        standing([attempt(0, *steps)])


def test_a_restart_from_a_step_that_was_never_reached_is_an_error() -> None:
    with pytest.raises(RecordError, match="only 2 was reached"):
        standing([attempt(0, 1, 2), attempt(3, 4)])


def test_losses_and_samples_are_read_back(tmp_path: Path) -> None:
    start = {"resumed": 0, "layout": "ddp", "world_size": 2, "time": 1.0}
    losses = write(tmp_path / "l", start, {"step": 1, "loss": "0x1p+1", "rate": 1, "time": 2.0})
    assert read_losses(losses) == [Attempt(0, "ddp", 2, 1.0, [Entry(1, "0x1p+1", 2.0)])]
    samples = write(tmp_path / "s", start, {"step": 1, "samples": [4, 2], "time": 2.0}, start)
    assert [len(one.entries) for one in read_samples(samples)] == [1, 0]
    assert read_samples(samples)[0].entries[0].value == (4, 2)


def test_a_diary_is_read_back(tmp_path: Path) -> None:
    line = {"what": "killed", "rank": 1, "attempt": 0, "time": 3.0, "step": 4}
    assert read_diary(write(tmp_path / "d", line)) == [Note("killed", 1, 0, 3.0, {"step": 4})]


@pytest.mark.parametrize(
    "text", ["{", '{"step": 1, "loss": "0x1p+1", "time": 0}\n', '{"resumed": 0}\n']
)
def test_a_log_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "losses.jsonl"
    file.write_text(text)
    with pytest.raises(RecordError, match=r"losses\.jsonl"):
        read_losses(file)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="absent"):
        read_losses(tmp_path / "absent")
