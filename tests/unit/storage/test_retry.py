"""What is tried again, how often, and after how long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import AlreadyExists, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.storage import Backoff, MemoryStore, RetryStore, Store, read_all
from dist_ckpt.testing import Fail, FaultyStore, Operation, Rule

OUTAGE = StorageError("an outage")


class _Waits:
    """Notes the waits that a store asks for, and waits for none."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"retry/{request.node.name}")


def faulty(
    memory: Store, operation: Operation, error: Exception, times: int, **more: bool
) -> Store:
    rules = [Rule(operation, Fail(error, **more), nth=nth) for nth in range(1, times + 1)]
    return FaultyStore(memory, rules)


class TestBackoff:
    @given(st.integers(1, 10_000), st.floats(0, 1))
    def test_waits_are_within_limits(self, failures: int, chance: float) -> None:
        delay = Backoff(longest_seconds=20.0).delay(failures, chance)
        assert 0.05 <= delay <= 20.0

    def test_waits_double_up_to_the_longest(self) -> None:
        backoff = Backoff(first_seconds=1.0, longest_seconds=6.0)
        assert [backoff.delay(n, 1.0) for n in range(1, 5)] == [1.0, 2.0, 4.0, 6.0]
        assert [backoff.delay(n, 0.0) for n in range(1, 5)] == [0.5, 1.0, 2.0, 3.0]

    def test_attempts_and_time_are_bounded(self) -> None:
        backoff = Backoff(attempts=3, total_seconds=10.0)
        assert [backoff.allows(n, 0.0) for n in (1, 2, 3)] == [True, True, False]
        assert not backoff.allows(1, 10.0)
        with pytest.raises(UsageError, match="at least 1"):
            Backoff(attempts=0)


CALLS: dict[Operation, Callable[[Store], object]] = {
    "put": lambda store: store.put("new", [b"1"]),
    "read_into": lambda store: store.read_into("k", 0, memoryview(bytearray(1))),
    "size": lambda store: store.size("k"),
    "list_entries": lambda store: list(store.list_entries()),
    "list_children": lambda store: store.list_children(),
    "delete": lambda store: store.delete(["k"]),
}


@pytest.mark.parametrize("operation", CALLS)
def test_what_may_pass_is_tried_again(memory: MemoryStore, operation: Operation) -> None:
    memory.put("k", [b"1"], mode="replace")
    waits = _Waits()
    store = RetryStore(faulty(memory, operation, OUTAGE, 2), sleep=waits)
    CALLS[operation](store)
    assert store.retries == 2
    assert len(waits.seconds) == 2
    assert waits.seconds[0] < waits.seconds[1]


@pytest.mark.parametrize(
    "error",
    [
        StorageError("forbidden", kind=ErrorKind.PERMISSION),
        StorageError("full", kind=ErrorKind.STORAGE_FULL),
        NotFound("gone"),
        UsageError("wrong"),
    ],
)
def test_what_will_not_change_is_not(memory: MemoryStore, error: Exception) -> None:
    waits = _Waits()
    store = RetryStore(faulty(memory, "put", error, 1), sleep=waits)
    with pytest.raises(type(error), match=str(error)):
        store.put("k", [b"1"])
    assert waits.seconds == []


def test_the_last_error_is_the_answer(memory: MemoryStore) -> None:
    waits = _Waits()
    store = RetryStore(faulty(memory, "size", OUTAGE, 9), Backoff(attempts=4), sleep=waits)
    with pytest.raises(StorageError, match="an outage"):
        store.size("k")
    assert len(waits.seconds) == 3


class TestLostAnswer:
    def store(self, memory: MemoryStore) -> RetryStore:
        inner = faulty(memory, "put", OUTAGE, 1, after=True)
        return RetryStore(inner, sleep=lambda seconds: None)

    def test_own_object_is_no_conflict(self, memory: MemoryStore) -> None:
        data = bytes(9 << 20)
        self.store(memory).put("k", [data[:5], b"", data[5:]])
        assert read_all(memory, "k") == data

    @pytest.mark.parametrize("other", [b"else", b"another length", b""])
    def test_object_of_another_is_one(self, memory: MemoryStore, other: bytes) -> None:
        class Raced(MemoryStore):
            def put(self, *_: object, **__: object) -> None:
                memory.put("k", [other], mode="replace")
                raise AlreadyExists("k")

        store = RetryStore(
            faulty(Raced(memory.url.removeprefix("memory://")), "put", OUTAGE, 1),
            sleep=lambda seconds: None,
        )
        with pytest.raises(AlreadyExists):
            store.put("k", [b"mine"])
        assert read_all(memory, "k") == other

    def test_object_that_was_there_before_is_one(self, memory: MemoryStore) -> None:
        memory.put("k", [b"mine"])
        with pytest.raises(AlreadyExists):
            RetryStore(memory).put("k", [b"mine"])
