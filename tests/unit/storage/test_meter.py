"""What a metered store counts and tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_ckpt import events
from dist_ckpt.errors import AlreadyExists, NotFound, StorageError
from dist_ckpt.storage import Entry, MemoryStore, MeterStore, RetryStore
from dist_ckpt.storage.meter import bucket
from dist_ckpt.testing import Fail, FaultyStore, Rule


@pytest.fixture
def told() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    end = events.subscribe(found.append)
    yield found
    end()


class _Clock:
    """Goes on by three milliseconds whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.003
        return self.now


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"meter/{request.node.name}")


def test_each_operation_is_an_event(memory: MemoryStore, told: list[events.Event]) -> None:
    store = MeterStore(memory, clock=_Clock())
    store.put("a/k", [b"123", b"45"])
    store.read_into("a/k", 2, memoryview(bytearray(10)))
    store.size("a/k")
    list(store.list_entries("a/"))
    store.list_children()
    store.delete(["a/k"])
    operations = [event for event in told if isinstance(event, events.StorageOperation)]
    assert [(each.operation, each.key, each.nbytes) for each in operations] == [
        ("put", "a/k", 5),
        ("read_into", "a/k", 3),
        ("size", "a/k", 0),
        ("list_entries", "a/", 0),
        ("list_children", "", 0),
        ("delete", "a/k", 0),
    ]
    assert all(each.seconds > 0 and each.error is None for each in operations)
    assert {each.url for each in operations} == {memory.url}


def test_failures_are_told_from_answers(memory: MemoryStore, told: list[events.Event]) -> None:
    outage = StorageError("an outage")
    store = MeterStore(FaultyStore(memory, [Rule("size", Fail(outage), nth=2)]))
    store.put("k", [b"."])
    with pytest.raises(AlreadyExists):
        store.put("k", [b"."])
    with pytest.raises(NotFound):
        store.size("missing")
    with pytest.raises(StorageError):
        store.size("k")
    use = store.usage().operations
    assert (use["put"].count, use["put"].failed, use["put"].nbytes) == (2, 0, 1)
    assert (use["size"].count, use["size"].failed) == (2, 1)
    assert [e.error for e in told if isinstance(e, events.StorageOperation)][-1] is outage


def test_usage_is_told_when_it_is_closed(memory: MemoryStore, told: list[events.Event]) -> None:
    inner = FaultyStore(memory, [Rule("put", Fail(StorageError("an outage")))])
    store = MeterStore(RetryStore(inner, sleep=lambda seconds: None), clock=_Clock())
    for number in range(4):
        store.put(f"k{number}", [bytes(10)])
    store.close()
    used = told[-1]
    assert used == store.usage()
    assert isinstance(used, events.StorageUsed)
    assert used.retries == 1
    put = used.operations["put"]
    assert put.nbytes == 40
    assert put.seconds == pytest.approx(4 * 0.003)
    assert dict(put.latencies) == {4: 4}


def test_time_of_the_caller_is_not_that_of_a_listing(memory: MemoryStore) -> None:
    clock = _Clock()
    store = MeterStore(memory, clock=clock)
    store.put("k", [b"."])
    for _ in store.list_entries():
        clock.now += 1000
    assert store.usage().operations["list_entries"].seconds < 1


def test_failed_listing_is_counted(memory: MemoryStore) -> None:
    class Breaking(MemoryStore):
        def list_entries(self, prefix: str = "") -> Iterator[Entry]:
            yield next(super().list_entries(prefix))
            raise StorageError("the second page")

    store = MeterStore(Breaking("meter/breaking"))
    store.put("k", [b"."], mode="replace")
    with pytest.raises(StorageError, match="second page"):
        list(store.list_entries())
    assert store.usage().operations["list_entries"].failed == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, 1), (0.001, 1), (0.0011, 2), (0.002, 2), (0.0021, 4), (0.5, 512), (1.03, 2048)],
)
def test_buckets_are_powers_of_two_milliseconds(seconds: float, expected: int) -> None:
    assert bucket(seconds) == expected
