"""Saves that fail, in a training that goes on: one process, and a store that breaks."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt import Checkpointer, events, policy
from dist_ckpt.errors import CheckpointError, FencedError, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import new_store

NO_ROOM = Fail(OSError(errno.ENOSPC, "No space left on device"))
MISSING = Fail(StorageError("the bucket does not answer"))


def broken_at(*steps: int, fault: Fail = MISSING) -> FaultyStore:
    """Return a store that takes no file of these steps."""
    rules = [Rule("put", fault, key=f"step-{each:010d}/*.safetensors", nth=None) for each in steps]
    return FaultyStore(new_store(), rules)


def train(ckpt: Checkpointer, steps: range) -> list[int]:
    """Tell `steps`, waiting for what is saved to be over; return at which ones one was begun."""
    begun = []
    with ckpt:
        for step in range(ckpt.restore() + 1, steps.stop):
            handle = ckpt.step(step)
            if handle is not None:
                handle.settle()
                begun.append(step)
    return begun


@pytest.mark.parametrize("fault", [MISSING, NO_ROOM], ids=["error of ours", "foreign error"])
def test_training_goes_on_and_saves_when_it_is_due(
    fault: Fail, caplog: pytest.LogCaptureFixture
) -> None:
    store = broken_at(4, 6, fault=fault)
    found: list[events.Event] = []
    unsubscribe = events.subscribe(found.append)
    ckpt = Checkpointer(store, {"n": 1}, every_steps=2, when_failed="warn", save_last=False)
    # Not at step 5, though that of step 4 is missing.
    assert train(ckpt, range(1, 10)) == [2, 4, 6, 8]
    unsubscribe()
    assert Repository(store).steps() == [2, 8]
    failed = [each.step for each in found if isinstance(each, events.SaveFailed)]
    assert failed == [4, 6]
    said = [each for each in caplog.messages if "training goes on" in each]
    assert [f"the save of step {step} to" in each for step, each in zip((4, 6), said, strict=True)]
    # Those who find the next checkpoint learn why the one before is so old.
    origins = [Repository(store).open(step).manifest.origin for step in (2, 8)]
    assert [each.get("failed_saves") for each in origins] == [None, 2]


def test_too_many_in_a_row_end_it() -> None:
    store = broken_at(1, 2, 4, 5, 6)
    ckpt = Checkpointer(
        store, {"n": 1}, every_steps=1, when_failed="warn", max_failures=3, save_last=False
    )
    with pytest.raises(StorageError, match="does not answer") as caught:
        train(ckpt, range(1, 10))
    assert caught.value.__notes__ == [
        "step 7 is being saved all the same, after 3 failures in a row"
    ]
    # The one that committed in between began a new row.
    assert Repository(store).steps() == [3, 7]


def test_it_is_raised_at_once_unless_somebody_asked_for_a_warning() -> None:
    with pytest.raises(StorageError):
        train(Checkpointer(broken_at(2), {"n": 1}, every_steps=2), range(1, 10))


def test_the_last_step_is_tried_once_more_at_the_end() -> None:
    rule = Rule("put", MISSING, key="step-0000000004/*.safetensors", nth=1)
    store = FaultyStore(new_store(), [rule])
    train(Checkpointer(store, {"n": 1}, every_steps=4, when_failed="warn"), range(1, 5))
    assert Repository(store).steps() == [4]
    # And where that fails too, somebody has to know.
    with pytest.raises(StorageError, match="does not answer"):
        train(Checkpointer(broken_at(4), {"n": 1}, every_steps=4, when_failed="warn"), range(1, 5))


def test_a_place_that_cannot_be_listed_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore(
        new_store(), [Rule("list_children", MISSING, key="claims/", nth=nth) for nth in (1, 2)]
    )
    found: list[events.Event] = []
    unsubscribe = events.subscribe(found.append)
    with Checkpointer(store, {"n": 1}, every_steps=1, when_failed="warn") as ckpt:
        handles = [ckpt.step(step) for step in (1, 2, 3)]
        assert [each and each.outcome for each in handles[:2]] == ["failed", "failed"]
        assert handles[0] is not None
        with pytest.raises(StorageError):
            handles[0].wait()
    unsubscribe()
    assert Repository(store).steps() == [3]
    assert [each.step for each in found if isinstance(each, events.SaveFailed)] == [1, 2]
    assert len([each for each in caplog.messages if "training goes on" in each]) == 2
    # The last step is not lost, though its own save could not begin.
    store = FaultyStore(new_store(), [Rule("list_children", MISSING, key="claims/")])
    with Checkpointer(store, {"n": 1}, every_steps=1, when_failed="warn") as ckpt:
        ckpt.step(1)
    assert Repository(store).steps() == [1]


def test_who_may_not_save_any_more_is_told_so_in_any_case() -> None:
    store = new_store()
    with (
        pytest.raises(FencedError, match="superseded"),
        Checkpointer(store, {"n": 1}, every_steps=1, when_failed="warn") as ckpt,
    ):
        ckpt.restore()
        Repository(store).claim()
        ckpt.step(1)
        ckpt.step(2)
    with (
        pytest.raises(UsageError, match="no type"),
        Checkpointer(new_store(), {"n": 1}, when=policy.never(), when_failed="warn") as ckpt,
    ):
        ckpt.save("no type")  # type: ignore[arg-type]


def test_a_restore_between_failures_is_not_ended_by_them() -> None:
    store = broken_at(2, 3)
    with Checkpointer(
        store, {"n": 1}, every_steps=1, when_failed="warn", max_failures=2, save_last=False
    ) as ckpt:
        for step in (1, 2):
            ckpt.step(step)
        assert ckpt.restore() == 1, "the failure of step 2 was warned of"
        ckpt.step(3)
        with pytest.raises(CheckpointError, match="does not answer"):
            ckpt.step(4)
        assert ckpt.step(5) is not None


def test_wait_tells_whoever_waits() -> None:
    with Checkpointer(broken_at(1), {"n": 1}, every_steps=1, when_failed="warn") as ckpt:
        handle = ckpt.step(1)
        assert handle is not None
        with pytest.raises(StorageError):
            handle.wait()
        ckpt.step(2)
    assert ckpt.exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        {"when_failed": "ignore"},
        {"max_failures": 0},
        {"max_failures": True},
        {"exclusive": 1},
        {"status_seconds": 0},
        {"exclusive": True, "status_seconds": None},
    ],
)
def test_values_that_are_none_of_their_option(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Checkpointer(new_store(), {"n": 1}, **options)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(broken=st.sets(st.integers(1, 9)), many=st.integers(1, 4))
def test_which_steps_are_there_after_whatever_failed(broken: set[int], many: int) -> None:
    """A model of it: training ends where `many` in a row failed, at the save after the last one."""
    row, ends = 0, None
    for step in range(1, 9):
        row = row + 1 if step in broken else 0
        if row == many:
            ends = step + 1
            break
    last = 9 if ends is None else ends
    store = broken_at(*broken)
    ckpt = Checkpointer(
        store, {"n": 1}, every_steps=1, when_failed="warn", max_failures=many, save_last=False
    )
    raised = None
    for step in range(1, 10):
        try:
            ckpt.step(step)
        except StorageError:
            raised = step
            break
    with suppress(StorageError):
        ckpt.close()
    assert raised == ends
    assert Repository(store).steps() == [s for s in range(1, last + 1) if s not in broken]
