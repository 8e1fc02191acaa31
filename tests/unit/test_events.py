"""Events reach every listener, and no listener can do harm."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable

import pytest

from dist_ckpt import events
from dist_ckpt.events import CheckpointDeleted, Event, StepEvent


def step_of(event: Event) -> int:
    assert isinstance(event, StepEvent)
    return event.step


def deleted(step: int) -> Event:
    return CheckpointDeleted("memory://x", step, 0, "not kept")


def test_listeners_hear_what_comes_between_subscribing_and_leaving() -> None:
    first: list[Event] = []
    second: list[Event] = []
    events.emit(deleted(1))
    leave_first = events.subscribe(first.append)
    events.emit(deleted(2))
    leave_second = events.subscribe(second.append)
    events.emit(deleted(3))
    leave_first()
    leave_first()  # a second time does nothing
    events.emit(deleted(4))
    leave_second()
    events.emit(deleted(5))
    assert [step_of(event) for event in first] == [2, 3]
    assert [step_of(event) for event in second] == [3, 4]


def test_a_listener_that_fails_is_logged_and_keeps_nobody_from_hearing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(event: Event) -> None:
        raise ValueError("not today")

    heard: list[Event] = []
    leaves = [events.subscribe(broken), events.subscribe(heard.append)]
    try:
        # Also where a user turned every warning into an error.
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            events.emit(deleted(1))
    finally:
        for leave in leaves:
            leave()
    assert len(heard) == 1
    (record,) = caplog.records
    assert record.name == "dist_ckpt"
    assert "broken" in record.getMessage()
    assert "CheckpointDeleted: ValueError: not today" in record.getMessage()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_program_passes_on_the_main_thread_alone(error: BaseException) -> None:
    def ends(event: events.Event) -> None:
        raise error

    leave = events.subscribe(ends)
    try:
        with pytest.raises(type(error)):
            events.emit(deleted(1))
        survived: list[bool] = []

        def emit() -> None:
            events.emit(deleted(1))
            survived.append(True)

        thread = threading.Thread(target=emit)
        thread.start()
        thread.join()
        assert survived == [True]
    finally:
        leave()


def test_a_listener_may_leave_or_subscribe_while_it_is_told() -> None:
    heard: list[int] = []

    def once(event: Event) -> None:
        heard.append(step_of(event))
        leave()
        leaves.append(events.subscribe(lambda later: heard.append(-step_of(later))))

    leaves: list[Callable[[], None]] = []
    leave = events.subscribe(once)
    try:
        events.emit(deleted(1))
        events.emit(deleted(2))
    finally:
        for each in leaves:
            each()
    assert heard == [1, -2]


def test_the_same_listener_may_subscribe_twice() -> None:
    heard: list[Event] = []
    leaves = [events.subscribe(heard.append) for _ in range(2)]
    events.emit(deleted(1))
    leaves[0]()
    events.emit(deleted(2))
    leaves[1]()
    assert [step_of(event) for event in heard] == [1, 1, 2]


def test_threads_may_subscribe_and_emit_at_once() -> None:
    heard: list[Event] = []
    leave = events.subscribe(heard.append)
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        for step in range(100):
            events.subscribe(lambda event: None)()
            events.emit(deleted(100 * number + step))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leave()
    assert sorted(step_of(event) for event in heard) == list(range(800))
