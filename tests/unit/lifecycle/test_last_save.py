"""The last step is saved at the end, and a step that is done is done."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import Checkpointer, EarlyStopping, keep, policy
from dist_ckpt.errors import (
    UsageError,
)
from dist_ckpt.repository import Repository
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule
from tests.unit.lifecycle.training import (
    LOSS,
    manifest_of,
    new_store,
    run_of,
    state,
    steps,
    warnings,
)
from tests.unit.saving.slow_store import EndlessPut


@pytest.fixture
def store() -> MemoryStore:
    return new_store()


# ---------------------------------------------------------------- the last step


def test_the_last_step_is_saved_at_the_end(store: MemoryStore) -> None:
    values = state()
    with Checkpointer(store, values, every_steps=5) as ckpt:
        for step in range(1, 13):
            values["weights"]["w"].fill_(step)
            ckpt.step(step, metrics={"n": torch.tensor(float(step), requires_grad=True) * 1})
    assert steps(store) == [5, 10, 12]
    manifest = manifest_of(store, 12)
    assert manifest.metrics == {"n": 12.0}
    assert manifest.origin["reason"] == "the last step"
    loaded = state()
    dist_ckpt.load(loaded, store)
    assert loaded["weights"]["w"].tolist() == [12.0] * 4


def test_the_last_epoch_is_saved_at_the_end(store: MemoryStore) -> None:
    with Checkpointer(store, state(), when=policy.every(epochs=2)) as ckpt:
        for epoch in range(1, 4):
            ckpt.epoch_end(epoch, metrics={LOSS: epoch})
    assert [(each.step, each.epoch) for each in Repository(store).records()] == [(2, 2), (3, 3)]
    assert manifest_of(store, 3).metrics == {LOSS: 3.0}


def test_a_save_that_was_skipped_is_made_up_for(store: MemoryStore) -> None:
    hang = Hang()
    slow = FaultyStore(store, [Rule("put", hang, key="step-0000000001/*", nth=1)])
    with Checkpointer(slow, state(), every_steps=1, when_busy="skip") as ckpt:
        ckpt.step(1)
        hang.reached.wait(60)
        handle = ckpt.step(2)
        assert handle is not None
        assert handle.outcome == "skipped"
        hang.release()
    assert steps(store) == [1, 2]


@pytest.mark.parametrize("error", [LookupError("training"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("how", ["finally", "except", "closing", "stack"])
def test_close_does_not_save_while_an_exception_is_handled(
    store: MemoryStore, error: BaseException, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = Checkpointer(store, state(), every_steps=5)

    def train() -> None:
        for step in range(1, 8):
            ckpt.step(step)
        raise error  # in the middle of step 8

    def train_and_close() -> None:
        if how == "closing":
            with closing(ckpt):
                train()
        elif how == "stack":
            with ExitStack() as stack:
                stack.callback(ckpt.close)
                train()
        try:
            train()
        except BaseException:
            if how == "except":
                ckpt.close()
            raise
        finally:
            ckpt.close()

    with pytest.raises(type(error)):
        train_and_close()
    assert steps(store) == [5]
    assert len(warnings(caplog)) == 1
    assert f"step 7 of {store.url} was told" in warnings(caplog)[0]
    assert f"close() came while a {type(error).__name__} was handled" in warnings(caplog)[0]


def test_a_training_that_is_all_in_a_handler_ends_as_any(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> None:
        ckpt = Checkpointer(store, state(), every_steps=5)
        for step in range(1, 8):
            ckpt.step(step)
        ckpt.close()

    try:
        raise MemoryError("the batch did not fit")
    except MemoryError:
        train()  # with a smaller one
    assert steps(store) == [5, 7]
    assert warnings(caplog) == []


def test_one_that_is_never_closed_says_what_is_lost(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    def train(last: int, **options: Any) -> None:
        ckpt = Checkpointer(store, state(), every_steps=5, **options)
        for step in range(ckpt.restore() + 1, last + 1):
            ckpt.step(step)
        ckpt.wait()

    train(5)
    gc.collect()
    train(7, save_last=False)
    gc.collect()
    assert warnings(caplog) == []
    train(8)
    gc.collect()
    assert len(warnings(caplog)) == 1
    assert f"step 8 of {store.url} was told, no save of it was due" in warnings(caplog)[0]
    assert "the Checkpointer was not closed" in warnings(caplog)[0]


@pytest.mark.parametrize("error", [LookupError("training"), KeyboardInterrupt(), SystemExit(1)])
def test_not_after_an_exception(store: MemoryStore, error: BaseException) -> None:
    with pytest.raises(type(error)), Checkpointer(store, state(), every_steps=5) as ckpt:
        for step in range(1, 8):
            ckpt.step(step)
        raise error
    assert steps(store) == [5]


def test_not_when_told_otherwise(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=5, save_last=False) as ckpt:
        for step in range(1, 8):
            ckpt.step(step)
    args = {"checkpoint_dir": "memory://unit-lifecycle-last", "checkpoint_interval": 5}
    with Checkpointer.from_args({**args, "no_save_last": True}, state()) as ckpt:
        for step in range(1, 8):
            ckpt.step(step)
    assert steps(store) == steps(MemoryStore("unit-lifecycle-last")) == [5]
    with pytest.raises(UsageError, match="save_last is True or False"):
        Checkpointer(store, state(), save_last="no")  # type: ignore[arg-type]


def test_not_a_state_that_is_another_one_by_now(store: MemoryStore) -> None:
    model, stopper = nn.Linear(2, 2), EarlyStopping(LOSS, patience=9)
    with Checkpointer(store, {"model": model, "stop": stopper}) as ckpt:
        ckpt.step(1, metrics={LOSS: 1.0})
        ckpt.step(2, metrics={LOSS: 2.0})
        assert ckpt.rollback() == 1
    assert steps(store) == [1]
    with Checkpointer(store, {"model": model, "stop": stopper}) as ckpt:
        assert ckpt.restore() == 1
        ckpt.step(2, metrics={LOSS: 2.0})
        assert ckpt.restore() == 1
    assert steps(store) == [1]
    # A rollback that was refused has changed nothing.
    with Checkpointer(store, state(), every_steps=10) as ckpt:
        ckpt.restore("none", discard_newer=True)
        ckpt.step(2)
        with pytest.raises(UsageError, match="by which metric"):
            ckpt.rollback()
    assert steps(store) == [2]


def test_a_last_save_that_fails_is_raised_by_the_end(store: MemoryStore) -> None:
    failing = FaultyStore(store, [Rule("put", Fail(OSError("full")), key="step-*")])
    ckpt = Checkpointer(failing, state(), every_steps=5, timeout_seconds=600)
    ckpt.step(1)
    with pytest.raises(dist_ckpt.CheckpointError, match="full"):
        ckpt.close()
    ckpt.close()
    assert steps(store) == []


# ---------------------------------------------------------------- done is done


def test_a_step_that_was_saved_is_done(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=2) as ckpt:
        ckpt.step(1)
        first = ckpt.step(2)
        assert ckpt.save(2) is first
        assert ckpt.save(2).wait()
        assert ckpt.step(2) is None
    assert steps(store) == [2]


def test_a_finished_job_that_is_started_again_ends_well(store: MemoryStore) -> None:
    for _ in range(3):
        with Checkpointer(store, state(), every_steps=4, keep=keep.latest(2)) as ckpt:
            for step in range(ckpt.restore() + 1, 11):
                ckpt.step(step)
            handle = ckpt.save(10)
            assert handle.wait()
            assert (handle.outcome, handle.step) == ("committed", 10)
            assert handle.save_id == manifest_of(store, 10).save_id
    assert steps(store) == [8, 10]


def test_a_cell_that_is_run_twice(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    ckpt = Checkpointer(store, state(), every_steps=2)
    for _ in range(2):
        for step in range(1, 5):
            ckpt.step(step)
        ckpt.save(4).wait()
    ckpt.close()
    assert steps(store) == [2, 4]
    (said,) = warnings(caplog)
    assert "step 1 was told" in said
    assert "after step 4 was stored" in said


@pytest.fixture
def held(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndlessPut]:
    """A store whose first commit goes on until somebody waits for it."""
    held = EndlessPut(store, "step-0000000001/manifest.json")
    settle = SaveHandle.settle

    def waited_for(handle: SaveHandle, timeout: float | None = None) -> bool:
        held.let_go.set()
        return settle(handle, timeout)

    monkeypatch.setattr(SaveHandle, "settle", waited_for)
    yield held
    held.let_go.set()


def test_a_cell_that_is_run_again_goes_on_with_what_the_first_was_saving(held: EndlessPut) -> None:
    def cell() -> tuple[Checkpointer, int]:
        ckpt = Checkpointer(held, state(), every_steps=1)
        return ckpt, ckpt.restore()

    first, start = cell()
    assert start == 0
    handle = first.step(1)
    held.reached.wait()
    again, start = cell()  # the variable `ckpt` of the cell is another one from here on
    assert start == 1
    assert handle is not None
    assert handle.wait()
    again.step(2)
    again.close()
    first.close()
    assert steps(held) == [1, 2]


def test_saves_in_the_background_in_a_row_are_all_made(held: EndlessPut) -> None:
    handles = [dist_ckpt.async_save(state(1), held, step=1)]
    held.reached.wait()
    handles.append(dist_ckpt.async_save(state(2), held, step=2))
    with Checkpointer(held, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 2
        ckpt.step(3)
        dist_ckpt.save(state(4), held, step=4)
    assert [each.wait() for each in handles]
    assert steps(held) == [1, 2, 3, 4]


def test_a_load_takes_what_the_process_is_still_saving(held: EndlessPut) -> None:
    handle = dist_ckpt.async_save(state(1), held, step=1)
    held.reached.wait()
    assert dist_ckpt.load(state(), held).step == 1
    assert handle.wait()


def test_one_step_off_after_a_restart_is_no_error(store: MemoryStore) -> None:
    run_of(store, 4)
    with Checkpointer(store, state(), every_steps=4) as ckpt:
        for step in range(ckpt.restore(), 9):
            ckpt.step(step)
    assert steps(store) == [4, 8]


def test_metrics_of_a_step_that_is_done_are_noted(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=2) as ckpt:
        ckpt.step(2)
        ckpt.save(2, metrics={LOSS: 1.5})
    (record,) = Repository(store).records()
    assert (record.metrics, record.epoch) == ({LOSS: 1.5}, None)


def test_metrics_of_a_step_that_was_restored_are_noted(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between the last save of an epoch and its evaluation, which the restart makes up."""
    run_of(store, 1, 2)
    with Checkpointer(store, state(), when=policy.every(epochs=1)) as ckpt:
        assert ckpt.restore() == 2
        ckpt.epoch_end(1, step=2, metrics={LOSS: 0.5})
    (record,) = (each for each in Repository(store).records() if each.step == 2)
    assert (record.epoch, record.metrics[LOSS]) == (1, 0.5)
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.restore()
        ckpt.save(2, metrics={LOSS: 0.5})
    assert warnings(caplog) == [], "all of that is known"
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.restore()
        ckpt.save(2, metrics={LOSS: 0.25})
    (said,) = warnings(caplog)
    assert "noting metrics of step 2" in said
    assert Repository(store).records()[-1].metrics == {LOSS: 0.5}


def test_a_save_that_failed_is_not_done(store: MemoryStore) -> None:
    failing = FaultyStore(store, [Rule("put", Fail(OSError("once")), key="step-*", nth=1)])
    with Checkpointer(failing, state()) as ckpt:
        with pytest.raises(dist_ckpt.CheckpointError, match="once"):
            ckpt.save(1).wait()
        ckpt.save(1).wait()
    assert steps(store) == [1]


@pytest.mark.parametrize("step", [True, 1.0])
def test_what_is_no_step_is_not_done_either(store: MemoryStore, step: Any) -> None:
    with Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
        with pytest.raises(UsageError, match="bad step"):
            ckpt.save(step)
