"""Work shared out over threads: all of it is done, or its failure is heard, and no thread stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from dist_ckpt.storage.parallel import Steps, in_parallel, in_two_steps
from dist_ckpt.waiting import Bell

_T = TypeVar("_T")


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_item_is_done_once(count: int, threads: int) -> None:
    done: list[int] = []
    before = set(threading.enumerate())
    in_parallel(done.append, range(count), threads=threads)
    assert sorted(done) == list(range(count))
    assert set(threading.enumerate()) <= before


def test_threads_work_at_the_same_time() -> None:
    # Nobody comes through before all four are there.
    barrier = threading.Barrier(4, timeout=600)

    def work(_: int) -> None:
        barrier.wait()

    in_parallel(work, range(4), threads=4)


def test_a_generator_is_never_entered_twice() -> None:
    inside = threading.Lock()

    def items() -> Iterator[int]:
        for number in range(200):
            assert inside.acquire(blocking=False)
            inside.release()
            yield number

    done: list[int] = []
    in_parallel(done.append, items(), threads=8)
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("failing", [0, 3, 9])
def test_a_failure_in_any_thread_is_raised_and_ends_the_rest(failing: int) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == failing:
            raise OSError(number, "broken")

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="broken"):
        in_parallel(work, range(100_000), threads=4)
    assert failing in begun
    assert len(begun) < 100_000
    assert set(threading.enumerate()) <= before


def test_a_failure_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise MemoryError("no more")

    with pytest.raises(MemoryError):
        in_parallel(lambda _: None, items(), threads=2)


def test_where_no_thread_can_be_had_the_caller_does_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    in_parallel(done.append, range(10), threads=8)
    assert done == list(range(10))


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, ended = threading.Event(), threading.Event()
    caller = threading.current_thread()
    both = threading.Barrier(2, timeout=600)
    real = Bell.wait_for

    def wait_for(bell: Bell, look: Callable[[], _T], timeout: float | None = None) -> _T:
        if threading.current_thread() is caller and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return real(bell, look, timeout)

    def work(number: int) -> None:
        both.wait()
        if threading.current_thread() is not caller:
            interrupted.wait(60)
            ended.set()

    monkeypatch.setattr(Bell, "wait_for", wait_for)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, range(2), threads=2)
    assert ended.is_set()


class TestTwoSteps:
    @pytest.mark.parametrize("under_way", [1, 2, 7])
    @pytest.mark.parametrize("count", [0, 1, 100])
    def test_each_item_goes_through_both(self, count: int, under_way: int) -> None:
        done: list[int] = []
        before = set(threading.enumerate())
        in_two_steps(
            lambda number: 2 * number,
            done.append,
            range(count),
            firsts=3,
            seconds=2,
            under_way=under_way,
        )
        assert sorted(done) == [2 * number for number in range(count)]
        assert set(threading.enumerate()) <= before

    def test_no_more_at_once_than_may_be(self) -> None:
        lock = threading.Lock()
        now = {"first": 0, "second": 0, "under way": 0}
        most = dict(now)

        def count(name: str, difference: int) -> None:
            with lock:
                now[name] += difference
                most[name] = max(most[name], now[name])

        def first(number: int) -> int:
            count("under way", 1)
            count("first", 1)
            os.sched_yield()
            count("first", -1)
            return number

        def second(_: int) -> None:
            count("second", 1)
            os.sched_yield()
            count("second", -1)
            count("under way", -1)

        in_two_steps(first, second, range(2000), firsts=3, seconds=2, under_way=4)
        assert most["first"] <= 3
        assert most["second"] <= 2
        assert most["under way"] <= 4
        assert set(now.values()) == {0}

    def test_first_steps_go_on_before_any_second_one(self) -> None:
        """Alone, a thread begins as much as may be under way, and then makes room one by one."""
        seen: list[str] = []

        def first(number: int) -> int:
            seen.append(f"read {number}")
            return number

        steps = Steps(first, lambda number: seen.append(f"copy {number}"), range(4), 2, 2, 2)
        while job := steps.next():
            job()
        reads = ["read 0", "read 1", "copy 0", "read 2", "copy 1", "read 3", "copy 2", "copy 3"]
        assert seen == reads

    def test_a_second_step_runs_while_first_ones_wait(self) -> None:
        copied = threading.Event()

        def first(number: int) -> int:
            assert number != 1 or copied.wait(60), "the copy of 0 waits for the read of 1"
            return number

        in_two_steps(first, lambda _: copied.set(), range(2), firsts=1, seconds=1, under_way=2)

    @pytest.mark.parametrize("step", ["first", "second"])
    @pytest.mark.parametrize("failing", [0, 5, 40])
    def test_a_failure_of_either_step_ends_all(self, step: str, failing: int) -> None:
        begun: list[int] = []

        def first(number: int) -> int:
            begun.append(number)
            if step == "first" and number == failing:
                raise OSError(number, "broken")
            return number

        def second(number: int) -> None:
            if step == "second" and number == failing:
                raise OSError(number, "broken")

        before = set(threading.enumerate())
        with pytest.raises(OSError, match="broken"):
            in_two_steps(first, second, range(100_000), firsts=3, seconds=2, under_way=4)
        assert len(begun) < 100_000
        assert set(threading.enumerate()) <= before

    def test_a_failure_of_the_items_is_raised(self) -> None:
        def items() -> Iterator[int]:
            yield 1
            raise MemoryError("no more")

        with pytest.raises(MemoryError):
            in_two_steps(lambda number: number, print, items(), firsts=2, seconds=2, under_way=4)

    def test_where_no_thread_can_be_had_the_caller_does_it_all(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        done: list[int] = []
        in_two_steps(
            lambda number: number, done.append, range(10), firsts=6, seconds=2, under_way=8
        )
        assert done == list(range(10))
