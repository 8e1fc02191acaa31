"""Each proof holds for a good run and fails, saying what, for each way a run can be bad."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from examples.demo_parts import proofs
from examples.demo_parts.proofs import ProofFailed
from examples.demo_parts.records import Attempt, Entry, Note

SAVED = {"model.w": "a", "optimizer.w.exp_avg": "b"}


def losses(resumed: int, *values: float, world_size: int = 2) -> Attempt[str]:
    entries = [Entry(step, v.hex(), 0.0) for step, v in enumerate(values, resumed + 1)]
    return Attempt(resumed, "fsdp", world_size, 0.0, entries)


def samples(resumed: int, *values: Sequence[int]) -> Attempt[tuple[int, ...]]:
    entries = [Entry(step, tuple(v), 0.0) for step, v in enumerate(values, resumed + 1)]
    return Attempt(resumed, "fsdp", 2, 0.0, entries)


REFERENCE = [losses(0, 5.0, 4.0, 3.0, 2.5, 2.0)]
KILLED = [losses(0, 5.0, 4.0, 3.0), losses(2, 3.0, 2.5, 2.0)]


def kill(step: int = 4, listed: Sequence[int] = (2,)) -> Note:
    return Note("killed", 1, 0, 0.0, {"step": step, "listed": list(listed)})


def restart(rank: int, listed: Sequence[int] = (2,)) -> Note:
    return Note("start", rank, 1, 1.0, {"listed": list(listed)})


def test_kill() -> None:
    line = proofs.kill_hit_a_save([kill(), restart(0), restart(1)], KILLED, step=4)
    assert "step 4" in line
    assert "resumed from 2" in line
    assert "1 step" in line


@pytest.mark.parametrize(
    ("notes", "attempts", "message"),
    [
        ([restart(0), restart(1)], KILLED, "was planned"),
        ([kill(), kill(), restart(0), restart(1)], KILLED, "was planned"),
        ([kill(step=3), restart(0), restart(1)], KILLED, "was planned"),
        ([kill(), restart(0), restart(1)], REFERENCE, "one restart"),
        ([kill(), restart(0)], KILLED, "2 workers restarted, 1"),
        ([kill(listed=[2, 4]), restart(0), restart(1)], KILLED, "listed as a checkpoint"),
        ([kill(), restart(0), restart(1, [2, 4])], KILLED, "listed as a checkpoint"),
        ([kill(listed=[1]), restart(0), restart(1)], KILLED, "resumed from 2"),
        ([kill(listed=[]), restart(0), restart(1)], KILLED, "resumed from 2"),
    ],
)
def test_kill_that_proves_nothing(
    notes: list[Note], attempts: list[Attempt[str]], message: str
) -> None:
    with pytest.raises(ProofFailed, match=message):
        proofs.kill_hit_a_save(notes, attempts, step=4)


def test_a_restart_from_zero_is_no_resume() -> None:
    attempts = [losses(0, 5.0), losses(0, 5.0)]
    with pytest.raises(ProofFailed, match="newest checkpoint"):
        proofs.kill_hit_a_save([kill(listed=[]), restart(0, []), restart(1, [])], attempts, step=4)


def test_same_losses() -> None:
    assert "all 5 losses" in proofs.same_losses(REFERENCE, KILLED)


@pytest.mark.parametrize(
    ("reference", "killed", "message"),
    [
        (REFERENCE, [losses(0, 5.0, 4.0), losses(2, 3.0, 2.5, 2.0000000000000004)], "of step 5"),
        # The step that was taken twice had another loss the first time.
        (REFERENCE, [losses(0, 5.0, 4.0, 3.5), losses(2, 3.0, 2.5, 2.0)], "of step 3"),
        (REFERENCE, [losses(0, 5.0, 4.0, 3.0, 2.5)], "steps 1 to 4"),
        ([losses(0)], [losses(0)], "no steps"),
        ([], [], "cannot be compared"),
        (REFERENCE, [losses(0, 5.0, 4.0, 3.0, 2.5, 2.0, world_size=1)], "cannot be compared"),
        (KILLED, KILLED, "cannot be compared"),
    ],
)
def test_losses_that_differ(
    reference: list[Attempt[str]], killed: list[Attempt[str]], message: str
) -> None:
    with pytest.raises(ProofFailed, match=message):
        proofs.same_losses(reference, killed)


def test_same_tensors() -> None:
    loaded = {"rank 0": dict(SAVED), "rank 1": dict(SAVED)}
    assert "all 2 " in proofs.same_tensors({"rank 0": SAVED}, loaded, step=4, workers=2)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({}, {"x": SAVED}, "0 ranks noted"),
        ({"r": SAVED}, {}, "0 of 1"),
        ({"r": SAVED}, {"x": SAVED, "y": SAVED}, "2 of 1"),
        ({"r": {}}, {"x": {}}, "no values of model"),
        ({"r": {"model.w": "a"}}, {"x": {"model.w": "a"}}, "no values of model or optimizer"),
        ({"r": SAVED}, {"x": {**SAVED, "model.w": "c"}}, r"x, among them model\.w"),
        ({"r": SAVED}, {"x": {**SAVED, "model.v": "c"}}, r"model\.v"),
        ({"r": SAVED}, {"x": {"model.w": "a"}}, r"optimizer\.w\.exp_avg"),
        ({"r": SAVED, "s": {**SAVED, "model.w": "c"}}, {"x": SAVED}, r"s, among them model\.w"),
    ],
)
def test_tensors_that_differ(
    saved: dict[str, dict[str, str]], loaded: dict[str, dict[str, str]], message: str
) -> None:
    with pytest.raises(ProofFailed, match=message):
        proofs.same_tensors(saved, loaded, step=4, workers=1)


def test_each_sample_once() -> None:
    killed = [
        [samples(0, [0], [2], [4]), samples(2, [4])],
        [samples(0, [1], [3]), samples(2, [5])],
    ]
    line = proofs.each_sample_once([killed, [[samples(3, [7, 6])]]], samples=8, label="chain")
    assert line.startswith("chain: each of the 8 samples")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([[samples(0, [0, 1])]], [[samples(1, [2])]], r"1 of 4 samples were seen never.*\[3\]"),
        ([[samples(0, [0, 1])]], [[samples(1, [2, 3, 0])]], r"more than once.*\[0\]"),
        ([[samples(0, [0, 1])]], [[samples(1, [2, 3, 9])]], r"of no epoch.*\[9\]"),
        ([[samples(0, [0, 1])]], [[samples(2, [2, 3])]], "do not follow step 1"),
        ([[samples(0, [0, 1])]], [[samples(0, [2, 3])]], "do not follow step 1"),
        ([[samples(0, [0, 1]), samples(0)]], [[samples(1, [2, 3])]], "do not follow step 0"),
        ([[samples(0, [0])], [samples(0, [1], [2])]], [[samples(1, [3])]], "different steps"),
        ([], [[samples(0, [0, 1, 2, 3])]], "different steps"),
    ],
)
def test_samples_lost_or_repeated(
    first: list[list[Attempt[tuple[int, ...]]]],
    second: list[list[Attempt[tuple[int, ...]]]],
    message: str,
) -> None:
    with pytest.raises(ProofFailed, match=message):
        proofs.each_sample_once([first, second], samples=4, label="chain")


def test_all_verified() -> None:
    assert "all 3 checkpoints of the 2 runs" in proofs.all_verified(
        {"a": {1: (), 2: ()}, "b": {1: ()}}
    )


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ({}, "no run"),
        ({"a": {}}, "the run a has no checkpoint"),
        ({"a": {1: (), 2: ("bit 3 flipped", "more")}}, "step 2 of the run a.*bit 3 flipped"),
    ],
)
def test_damaged_checkpoints(problems: dict[str, dict[int, tuple[str, ...]]], message: str) -> None:
    with pytest.raises(ProofFailed, match=message):
        proofs.all_verified(problems)
