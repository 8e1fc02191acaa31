"""What would never be saved, and the metric that is never told, are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ckpt import Checkpointer, EarlyStopping, TrainState, keep, policy
from dist_ckpt.errors import (
    UsageError,
)
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.lifecycle.training import (
    LOSS,
    new_store,
    state,
    steps,
    warnings,
)


@pytest.fixture
def store() -> MemoryStore:
    return new_store()


# ---------------------------------------------------------------- nothing would ever be saved


@pytest.mark.parametrize("tell", ["step", "epoch_end"])
def test_telling_one_that_can_never_save_is_an_error(store: MemoryStore, tell: str) -> None:
    with Checkpointer(store, state()) as ckpt:
        with pytest.raises(UsageError, match=r"every_steps=500 .*policy\.never"):
            getattr(ckpt, tell)(1)
        ckpt.save(1)  # by hand it can
    assert steps(store) == [1]


@pytest.mark.parametrize(
    "how",
    [{"when": policy.never()}, {"when": policy.every(3)}, {"every_steps": 3}],
)
def test_who_says_when_is_told_nothing(
    store: MemoryStore, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), **how) as ckpt:
        for step in range(1, 4):
            ckpt.step(step)
    assert steps(store) == ([3] if how != {"when": policy.never()} else [])
    assert warnings(caplog) == []


def test_an_early_stopping_says_when(store: MemoryStore) -> None:
    stopper = EarlyStopping(LOSS, patience=2)
    with Checkpointer(store, TrainState(stop=stopper)) as ckpt:
        ckpt.step(1, metrics={LOSS: 1.0})
    assert steps(store) == [1]


def test_flags_that_do_not_say_when_to_save_have_a_default_that_is_said_once(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    args: dict[str, Any] = {"checkpoint_dir": "memory://unit-lifecycle-flags", "auto_resume": True}
    with Checkpointer.from_args(args, state()) as ckpt:
        ckpt.restore()
        ckpt.step(1)
    (said,) = warnings(caplog)
    assert "every 30 minutes by the clock, and the last step" in said
    assert Repository(resolve(args["checkpoint_dir"])).steps() == [1]
    caplog.clear()
    Checkpointer.from_args(args, state(), when=policy.never()).close()
    Checkpointer.from_args({**args, "checkpoint_interval": 5}, state()).close()
    assert warnings(caplog) == []


def test_steps_are_counted_where_only_epochs_are_told(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), every_steps=2) as ckpt:
        for epoch in range(1, 5):
            ckpt.epoch_end(epoch)
    (said,) = warnings(caplog)
    assert "counts steps, and only the end of an epoch was told" in said
    assert steps(store) == [4], "the last is saved all the same"


def test_multiples_that_the_steps_told_jump_over_are_said(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), when=policy.every(10) | policy.every(7)) as ckpt:
        for step in range(0, 28, 7):
            ckpt.step(step)
    (said,) = warnings(caplog)
    assert "policy.every(10)" in said
    assert "the steps from 7 to 14" in said
    assert steps(store) == [0, 7, 14, 21]


@pytest.mark.parametrize(
    ("when", "told", "between"),
    [
        (policy.at(5), [0, 3, 6, 9], "steps from 3 to 6"),
        (policy.last(100), [60, 90, 120], "steps from 90 to 120"),
        (policy.at(9, 10), [3, 6, 9, 12], "steps from 9 to 12"),
        # What is due for one member is no save that the other asked for.
        (policy.every(3) | policy.every(5), [0, 3, 6], "steps from 3 to 6"),
    ],
)
def test_a_step_that_is_jumped_over_is_said(
    store: MemoryStore,
    when: policy.SavePolicy,
    told: list[int],
    between: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Checkpointer(store, state(), when=when) as ckpt:
        for step in told:
            ckpt.step(step)
    (said,) = warnings(caplog)
    assert between in said
    assert "no save is made for it" in said


def test_epochs_that_are_jumped_over_are_said(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), when=policy.every(epochs=2)) as ckpt:
        for epoch in (1, 3, 5):
            ckpt.epoch_end(epoch)
    (said,) = warnings(caplog)
    assert "policy.every(epochs=2)" in said
    assert "at none of the epochs from 1 to 3" in said


def test_a_step_that_is_jumped_over_right_after_a_restart_is_said(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), every_steps=3) as ckpt:
        ckpt.step(3)
    with Checkpointer(store, state(), when=policy.at(5)) as ckpt:
        assert ckpt.restore() == 3
        ckpt.step(6)
    (said,) = warnings(caplog)
    assert "steps from 3 to 6" in said


@pytest.mark.parametrize(
    ("when", "told"),
    [
        (policy.at(5, 6), [3, 6]),
        (policy.at(3), [3, 6, 9]),
        (policy.at(2), [3, 6, 9]),
        (policy.at(100), [3, 6, 9]),
        (policy.every(5), [4, 10]),
    ],
)
def test_steps_that_are_told_or_not_come_to_are_nothing_to_say(
    store: MemoryStore, when: policy.SavePolicy, told: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), when=when) as ckpt:
        for step in told:
            ckpt.step(step)
    assert warnings(caplog) == []


def test_a_step_saved_by_hand_was_not_jumped_over(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), when=policy.at(5)) as ckpt:
        ckpt.step(3)
        ckpt.save(5)
        ckpt.step(6)
    assert warnings(caplog) == []


def test_another_state_is_no_jump(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = MemoryStore("unit-lifecycle-elsewhere")
    with Checkpointer(elsewhere, state()) as ckpt:
        ckpt.save(100)
    with Checkpointer(store, state(), when=policy.at(50)) as ckpt:
        ckpt.step(3)
        assert ckpt.restore(url=elsewhere) == 100
        ckpt.step(101)
    assert warnings(caplog) == []


def test_epochs_are_counted_where_only_steps_are_told(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, state(), when=policy.every(epochs=1)) as ckpt:
        for step in range(1, 5):
            ckpt.step(step)
    (said,) = warnings(caplog)
    assert "counts the ends of epochs, and none was told" in said
    assert steps(store) == [4]


# ---------------------------------------------------------------- a metric that is never told


def watching(kind: str, metric: str) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "better": {"when": policy.better(metric)},
        "kept": {"keep": keep.best(metric), "every_steps": 100},
        "stopping": {},
    }
    parts = state()
    if kind == "stopping":
        parts["stop"] = EarlyStopping(metric, patience=3)
    return {"state": parts, **kinds[kind]}


@pytest.mark.parametrize("kind", ["better", "kept", "stopping"])
def test_a_slip_of_the_pen_is_said_at_the_first_telling(
    store: MemoryStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, **watching(kind, "val/los"), save_last=False) as ckpt:
        ckpt.step(1, metrics={LOSS: 1.0})
        (said,) = warnings(caplog)
        assert "no metric 'val/los' (it has: 'val/loss') (did you mean 'val/loss'?)" in said
        ckpt.step(2, metrics={LOSS: 1.0})
        ckpt.epoch_end(1, metrics={LOSS: 1.0})
    assert len(warnings(caplog)) == 1


def test_another_metric_is_missed_after_the_first_epoch_that_has_some(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, **watching("better", "val/accuracy")) as ckpt:
        ckpt.step(1, metrics={"train/loss": 1.0})
        ckpt.epoch_end(1)
        assert warnings(caplog) == []
        ckpt.step(2, metrics={"train/loss": 1.0})
        ckpt.epoch_end(2, metrics={LOSS: 1.0})
        (said,) = warnings(caplog)
    assert "has no metric 'val/accuracy' (it has: 'train/loss', 'val/loss')" in said
    assert len(warnings(caplog)) == 1


def test_at_the_end_at_the_latest(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(store, **watching("better", "val/accuracy")) as ckpt:
        ckpt.step(1, metrics={"train/loss": 1.0})
        ckpt.step(2)
    assert ["has no metric 'val/accuracy'" in said for said in warnings(caplog)] == [True]


def test_a_metric_that_is_told_now_and_then_is_not_missed(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, **watching("better", LOSS)) as ckpt:
        for step in range(1, 5):
            ckpt.step(step, metrics={LOSS: 1.0} if step == 4 else {"train/loss": 1.0})
    with Checkpointer(store, **watching("better", "never")) as ckpt:
        ckpt.restore()  # only looks
    assert warnings(caplog) == []


# ---------------------------------------------------------------- begun beside what others wrote


@pytest.mark.parametrize("name", [".metadata", "last.pt", "model.safetensors", "epoch=3.ckpt"])
def test_what_another_program_wrote_there_is_not_begun_over_in_silence(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(b"theirs")
    with Checkpointer(tmp_path, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 0
        assert len(warnings(caplog)) == 1
        assert f"begin from {name}, which another program wrote" in warnings(caplog)[0]
        ckpt.step(1)
    with Checkpointer(tmp_path, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 1
    assert len(warnings(caplog)) == 1, "a run that has checkpoints is what is meant"
    assert (tmp_path / name).read_bytes() == b"theirs"


def test_who_says_that_the_training_begins_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "last.pt").write_bytes(b"theirs")
    (tmp_path / "notes.txt").write_text("mine")
    with Checkpointer(tmp_path, state(), every_steps=1) as ckpt:
        ckpt.restore("none")
    with Checkpointer(tmp_path / "new", state(), every_steps=1) as ckpt:
        ckpt.restore()
    assert warnings(caplog) == []
