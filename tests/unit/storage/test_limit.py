"""Limits: so many at once, so many bytes a second, and one that finds itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import LimitStore, MemoryStore
from dist_ckpt.storage.limit import AdaptiveLimit
from dist_ckpt.testing import FaultyStore, Hang, Rule


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def test_so_many_operations_at_once() -> None:
    hang = Hang()
    inner = FaultyStore(MemoryStore("limit/at-once"), [Rule("put", hang, nth=None)])
    store = LimitStore(inner, max_concurrent=2)
    with ThreadPoolExecutor(5) as pool:
        puts = [pool.submit(store.put, f"k{number}", [b"."]) for number in range(5)]
        assert hang.reached.wait(30)
        # Of five that want, no more than two ever got to the store inside.
        assert inner.fired[0] <= 2
        hang.release()
        for put in puts:
            put.result(30)
    assert inner.fired == [5]


def test_slots_are_free_again_after_a_failure() -> None:
    store = LimitStore(MemoryStore("limit/slots"), max_concurrent=1)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            store.size("missing")
    store.put("k", [b"."], mode="replace")


def test_bytes_a_second_are_those_of_puts_and_reads_together() -> None:
    clock = _Clock()
    store = LimitStore(
        MemoryStore("limit/bytes"), max_bytes_per_second=1000.0, clock=clock, sleep=clock.wait
    )
    store.put("k", [bytes(300), bytes(200)], mode="replace")
    assert clock.waits == []
    store.read_into("k", 0, memoryview(bytearray(250)))
    assert clock.waits == [pytest.approx(0.5)]
    store.size("k")
    clock.now += 0.1
    store.read_into("k", 0, memoryview(bytearray(10)))
    assert clock.waits[1:] == [pytest.approx(0.15)]
    # What was not used while nothing happened is not saved up for later.
    clock.now += 60
    store.put("k", [bytes(2000)], mode="replace")
    store.put("k", [bytes(1)], mode="replace")
    assert clock.waits[2:] == [pytest.approx(2.0)]


def test_bytes_behind_the_end_of_an_object_are_not_counted() -> None:
    clock = _Clock()
    store = LimitStore(
        MemoryStore("limit/short"), max_bytes_per_second=1000.0, clock=clock, sleep=clock.wait
    )
    store.put("k", [bytes(100)], mode="replace")
    clock.now += 60
    store.read_into("k", 0, memoryview(bytearray(1_000_000)))
    store.read_into("k", 0, memoryview(bytearray(1)))
    assert clock.waits == [pytest.approx(0.1)]


def test_limits_may_be_numbers_of_numpy() -> None:
    most: Any = np.int64(2)
    rate: Any = np.float32(1e9)
    LimitStore(MemoryStore("limit/numpy"), max_concurrent=most, max_bytes_per_second=rate)
    with pytest.raises(UsageError, match="max_concurrent"):
        LimitStore(MemoryStore("limit/wrong"), max_concurrent=True)
    with pytest.raises(UsageError, match="max_bytes_per_second"):
        LimitStore(MemoryStore("limit/wrong"), max_bytes_per_second=True)


def test_limits_are_positive() -> None:
    with pytest.raises(UsageError, match="max_concurrent"):
        LimitStore(MemoryStore("limit/wrong"), max_concurrent=0)
    with pytest.raises(UsageError, match="max_bytes_per_second"):
        LimitStore(MemoryStore("limit/wrong"), max_bytes_per_second=0.0)


def test_works_from_many_threads() -> None:
    store = LimitStore(MemoryStore("limit/threads"), max_concurrent=3, max_bytes_per_second=1e12)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(20):
            store.put(f"{number}/{turn}", [b"."], mode="replace")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(list(store.list_entries())) == 160


class TestAdaptiveLimit:
    def test_a_complaint_halves_it_and_successes_raise_it_again(self) -> None:
        limit = AdaptiveLimit(16)
        assert limit.limit == 16
        limit.throttled(0.0)
        assert limit.limit == 8
        for _ in range(9):  # a full round, and a bit
            limit.succeeded()
        assert limit.limit == 9
        for _ in range(1000):
            limit.succeeded()
        assert limit.limit == 16

    def test_complaints_of_one_moment_count_once(self) -> None:
        limit = AdaptiveLimit(16)
        for now in (0.0, 0.1, 0.9):
            limit.throttled(now)
        assert limit.limit == 8
        limit.throttled(1.0)
        assert limit.limit == 4

    def test_never_below_one(self) -> None:
        limit = AdaptiveLimit(3)
        for now in range(10):
            limit.throttled(float(now))
        assert limit.limit == 1
        with pytest.raises(UsageError, match="at least 1"):
            AdaptiveLimit(0)
