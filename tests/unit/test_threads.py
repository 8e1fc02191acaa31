"""Threads: work shared out is all done or its failure heard, and an interrupt breaks no wait."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from dist_ckpt.threads import Bell, Latch, Steps, ahead, in_parallel, in_two_steps

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


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 9])
def test_results_come_in_the_order_of_their_items(items: int, count: int) -> None:
    assert list(ahead(lambda number: -number, range(items), count=count)) == [
        -number for number in range(items)
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_so_many_results_are_made_while_one_is_used(count: int) -> None:
    taken: list[int] = []
    made = {number: threading.Event() for number in range(10)}

    def items() -> Iterator[int]:
        for number in made:
            taken.append(number)
            yield number

    def make(number: int) -> int:
        made[number].set()
        return number

    for number in ahead(make, items(), count=count):
        # Asked for nothing, and made all the same: but no more of them.
        for other in range(number, min(number + 1 + count, len(made))):
            assert made[other].wait(timeout=600)
        assert len(taken) == min(number + 1 + count, len(made))


def test_a_result_that_cannot_be_made_is_an_error_in_its_place() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise KeyError(number)
        return number

    found: list[int] = []
    with pytest.raises(KeyError):
        found.extend(ahead(make, range(9), count=3))
    # All that were before it came through.
    assert found == [0, 1]


def test_nothing_is_made_any_more_when_results_are_given_up() -> None:
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def make(number: int) -> int:
        if number == 1:
            begun.set()
            assert go_on.wait(timeout=600)
            over.set()
        return number

    results = ahead(make, range(9), count=1)
    assert next(results) == 0
    assert begun.wait(timeout=600)
    threading.Timer(0.05, go_on.set).start()
    results.close()
    # What it reads from can be closed now.
    assert over.is_set()


def test_where_no_thread_can_be_had_results_are_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(ahead(lambda number: number, range(5), count=2)) == [0, 1, 2, 3, 4]


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


# Interrupts at any moment of a wait leave nothing locked, nobody at work, and no other error.


ROOT = Path(__file__).resolve().parents[2]

# A wait is interrupted where each of its functions begins, one after the other, and then by a
# SIGINT at a random moment of each round, after which it is looked at what is left. A signal that
# comes late is nothing: the next round has another.
PROGRAM = r'''
import os, signal, subprocess, sys, threading
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.s3_client import OnLoop
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.threads import Latch, Worker, in_parallel, in_two_steps
from tests.interrupted import is_interrupted

SENDER = """
import os, random, sys, time
for line in sys.stdin:
    until = time.perf_counter() + random.random() * float(line)
    while time.perf_counter() < until:
        pass
    os.kill(int(sys.argv[1]), 2)
"""
armed = False

def handle(number, frame):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handle)
sender = subprocess.Popen(
    [sys.executable, "-c", SENDER, str(os.getpid())], stdin=subprocess.PIPE, bufsize=0
)
way, rounds, at_most = sys.argv[1], int(sys.argv[2]), b"0.001\n"
at_work = set()

def work(item):
    me = object()
    try:
        at_work.add(me)
        # Others take longer: the thread that is interrupted is the first that has nothing to do.
        is_main = threading.current_thread() is threading.main_thread()
        Latch().wait(0.00005 if is_main else 0.005)
        return item
    finally:
        at_work.discard(me)

async def answer():
    return "fine"

def go_on(wait):
    while armed:  # Python itself loses an interrupt in the finalizer of an object
        wait()

def until_interrupted(wait):
    global armed
    try:
        armed = True
        sender.stdin.write(at_most)
        go_on(wait)  # the jump back of a loop is outside of the `try` around it in Python 3.13
    except KeyboardInterrupt:
        return
    finally:
        armed = False

store = LimitStore(MemoryStore("interrupted"), max_concurrent=1)
store.put("key", [b"value"])
once = [Latch()]
workers = []

def wait_for_worker():
    worker = Worker(lambda: work(None), name="worker", daemon=True)
    workers.append(worker)
    worker.start()
    worker.wait()

def is_whole_after_latch():
    latch, once[0] = once[0], Latch()
    threading.Thread(target=latch.open, daemon=True).start()
    assert latch.wait(60)

def is_whole_after_limit():
    other = threading.Thread(target=store.size, args=["key"], daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()

def is_whole_after_loop():
    assert OnLoop(answer).result() == "fine"

def is_whole_after_worker():
    while workers:
        workers.pop().wait()

def nothing_is_left():
    pass

# What waits, and what must hold after it was interrupted.
WAYS = {
    "latch": (lambda: once[0].wait(0.00002), is_whole_after_latch),
    "threads": (lambda: in_parallel(work, range(8), threads=3), nothing_is_left),
    "two steps": (
        lambda: in_two_steps(work, work, range(8), firsts=2, seconds=2, under_way=3),
        nothing_is_left,
    ),
    "loop": (lambda: OnLoop(answer).result(), is_whole_after_loop),
    "worker": (wait_for_worker, is_whole_after_worker),
    "limit": (lambda: store.size("key"), is_whole_after_limit),
}
wait, look = WAYS[way]

def check():
    look()
    assert not at_work, "nobody works on what the caller may close now"

number = 1
while is_interrupted(number, wait):
    check()
    number += 1
for _ in range(rounds):
    until_interrupted(wait)
    check()
sender.kill()
print("fine")
'''


@pytest.mark.parametrize("way", ["latch", "threads", "two steps", "loop", "worker", "limit"])
def test_an_interrupt_at_any_moment_breaks_nothing(way: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, way, "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "fine\n", ran.stderr


def test_a_latch_lets_all_go_at_once_and_for_ever() -> None:
    latch = Latch()
    assert not latch.wait(0)
    assert not latch.is_open
    threads = [threading.Thread(target=latch.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    latch.open()
    for thread in threads:
        thread.join()
    assert latch.wait()
    assert latch.is_open


def test_who_waits_for_a_bell_misses_no_change() -> None:
    bell = Bell()
    done: list[int] = []

    def has_come(least: int) -> bool:
        return len(done) >= least

    def change() -> None:
        for number in range(1000):
            done.append(number)
            bell.ring()

    other = threading.Thread(target=change)
    other.start()
    for least in range(1, 1001):
        assert bell.wait_for(partial(has_come, least))
    other.join()


def test_a_wait_that_is_too_long_for_the_system_is_as_long_as_may_be() -> None:
    bell = Bell()
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(bell.wait_for(found.copy, 1e30)[0]))
    other.start()
    found.append("here")
    bell.ring()
    other.join()
    assert found == ["here", "here"]
