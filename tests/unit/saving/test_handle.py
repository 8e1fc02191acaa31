"""A save as its caller sees it: over once, told once, and given up at its deadline."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, StorageError
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.saving.handle import SaveHandle, SaveHooks, SaveOutcome, SaveProgress
from tests.unit.ranks.rounds import long, on_every_rank

WRITING = SaveProgress("writing", 3, 10)
OVER = Deadline(time.monotonic() - 1, 1)


def make(
    deadline: Deadline,
    overdue: Callable[[], CheckpointError | None] = lambda: None,
    announce: Callable[[Exception | None], None] = lambda error: None,
    cancel: Callable[[], None] = lambda: None,
) -> SaveHandle:
    hooks = SaveHooks(overdue=overdue, announce=announce, cancel=cancel, progress=lambda: WRITING)
    return SaveHandle(7, "c000001-0123456789abcdef", deadline, hooks)


def outcome_of(handle: SaveHandle) -> SaveOutcome | None:
    """Return the outcome of now: a property is not a constant, whatever mypy takes it for."""
    return handle.outcome


def test_a_save_that_succeeds() -> None:
    handle = make(long())
    assert not handle.done()
    assert outcome_of(handle) is None
    assert handle.wait(timeout=0) is False
    assert handle.progress == WRITING
    assert handle.finish(None)
    assert handle.done()
    assert handle.outcome == "committed"
    assert handle.progress == SaveProgress("done", 3, 10)
    assert handle.wait() is True
    assert not handle.failed
    assert handle.take_error() is None


def test_a_failure_is_raised_by_every_wait_and_told_once() -> None:
    handle = make(long())
    handle.finish(StorageError("disk full"))
    for _ in range(2):
        with pytest.raises(StorageError, match="disk full"):
            handle.wait()
    assert handle.failed
    assert handle.take_error() is None, "who waited knows it"
    other = make(long())
    other.finish(StorageError("disk full"))
    assert isinstance(other.take_error(), StorageError)
    assert other.take_error() is None


def test_a_cancelled_save_is_raised_to_who_waits_and_to_nobody_else() -> None:
    asked: list[str] = []
    handle = make(long(), cancel=lambda: asked.append("cancel"))
    assert handle.cancel()
    assert asked == ["cancel"]
    assert outcome_of(handle) is None, "asked for is not done"
    handle.finish(CoordinationError("was cancelled", kind=ErrorKind.CANCELLED))
    assert handle.outcome == "cancelled"
    assert handle.take_error() is None, "somebody wanted it so"
    with pytest.raises(CoordinationError, match="was cancelled"):
        handle.wait()


@pytest.mark.parametrize("error", [None, StorageError("disk full")])
def test_what_is_over_is_not_cancelled(error: CheckpointError | None) -> None:
    def never() -> None:
        raise AssertionError("must not be asked")

    handle = make(long(), cancel=never)
    handle.finish(error)
    assert not handle.cancel()
    assert handle.outcome == ("failed" if error else "committed")


def test_a_skipped_save_is_over_from_the_start() -> None:
    handle = SaveHandle.skipped(7)
    assert (handle.step, handle.save_id, handle.outcome) == (7, "", "skipped")
    assert handle.done()
    assert handle.wait()
    assert not handle.cancel()
    assert handle.take_error() is None
    assert handle.progress == SaveProgress("done", 0, 0)


def test_the_first_outcome_stands_and_is_announced_before_anybody_goes_on() -> None:
    told: list[Exception | None] = []
    handle = make(long(), announce=lambda error: told.append(error) or seen.append(handle.done()))  # type: ignore[func-returns-value]
    seen: list[bool] = []
    assert handle.finish(None)
    assert not handle.finish(StorageError("too late"))
    assert told == [None]
    assert seen == [False]
    assert handle.wait()


def test_before_the_deadline_is_near_nobody_is_asked() -> None:
    def never() -> CheckpointError | None:
        raise AssertionError("must not be asked")

    assert make(long(), overdue=never).settle(timeout=0.01) is False


def test_an_overdue_save_ends_with_the_error_found() -> None:
    answers = iter([None, CoordinationError("hung")])
    handle = make(OVER, overdue=lambda: next(answers))
    with pytest.raises(CoordinationError, match="hung"):
        handle.wait()


def test_it_is_given_up_once_however_many_wait() -> None:
    given_up: list[CheckpointError] = []

    def overdue() -> CheckpointError:
        given_up.append(CoordinationError("hung"))
        return given_up[-1]

    told: list[Exception | None] = []
    handle = make(OVER, overdue=overdue, announce=told.append)
    results = on_every_rank([handle.wait] * 8)
    assert len(given_up) == 1
    assert told == given_up
    assert results == given_up * 8


def test_a_writer_that_comes_back_in_time_wins() -> None:
    asked = threading.Event()

    def overdue() -> CheckpointError | None:
        asked.set()
        return None

    handle = make(OVER, overdue=overdue)
    waiter = threading.Thread(target=handle.wait)
    waiter.start()
    asked.wait()
    handle.finish(None)
    waiter.join()
    assert not handle.failed


class Heavy:
    """Stands for a model."""

    def none(self) -> CheckpointError | None:
        return None

    def note(self, error: Exception | None) -> None:
        pass


def test_a_handle_that_is_over_keeps_nothing_alive() -> None:
    model = Heavy()
    alive = weakref.ref(model)
    handle = make(long(), overdue=model.none, announce=model.note)
    handle.finish(None)
    del model
    gc.collect()
    assert alive() is None
    assert handle.wait()
