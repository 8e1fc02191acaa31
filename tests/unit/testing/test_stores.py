"""The failing stores fail as told, when told, and only then."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ckpt.errors import AlreadyExists, StorageError, UsageError
from dist_ckpt.storage import Entry, LocalStore, MemoryStore, Store, Sweeper, read_all
from dist_ckpt.testing import (
    CHANGES,
    OPERATIONS,
    CrashStore,
    Fail,
    FaultyStore,
    Flip,
    Hang,
    LatencyStore,
    Operation,
    Rule,
    Truncate,
)

REPOSITORY = Path(__file__).parents[3]
_numbers = itertools.count()


@pytest.fixture
def inner() -> Store:
    """A store that holds `a/x` and `a/y`."""
    store = MemoryStore(f"stores-test/{next(_numbers)}")
    store.put("a/x", [b"0123456789"])
    store.put("a/y", [b"y"])
    return store


def call_of(operation: Operation, store: Store, key: str = "a/x") -> Callable[[], object]:
    calls: dict[Operation, Callable[[], object]] = {
        "put": lambda: store.put(key, [b"new"], mode="replace"),
        "read_into": lambda: store.read_into(key, 0, memoryview(bytearray(4))),
        "size": lambda: store.size(key),
        "list_entries": lambda: store.list_entries("a/"),
        "list_children": lambda: store.list_children("a/"),
        "delete": lambda: store.delete([key]),
    }
    return calls[operation]


def read(store: Store, key: str, nbytes: int = 20, offset: int = 0) -> bytes:
    target = bytearray(nbytes)
    return bytes(target[: store.read_into(key, offset, memoryview(target))])


class TestFail:
    @pytest.mark.parametrize("operation", sorted(OPERATIONS))
    def test_nth_operation_of_its_kind(self, inner: Store, operation: Operation) -> None:
        error = StorageError("as told")
        store = FaultyStore(inner, [Rule(operation, Fail(error), nth=2)])
        for other in OPERATIONS - {operation, "delete"}:
            call_of(other, store)()
        call = call_of(operation, store)
        call()
        assert store.fired == [0]
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value is error
        assert store.fired == [1]
        call_of("put", store)()
        call()

    def test_every_operation_on_keys_that_match(self, inner: Store) -> None:
        store = FaultyStore(inner, [Rule("put", Fail(OSError("no")), key="*/model.*", nth=None)])
        for _ in range(3):
            with pytest.raises(OSError, match="no"):
                store.put("step/save/model.r00000", [b"."])
            store.put("step/save/optimizer.r00000", [b"."], mode="replace")
        assert store.fired == [3]
        assert inner.list_children("step/save/") == ["optimizer.r00000"]

    def test_before_or_after_the_operation_is_done(self, inner: Store) -> None:
        for key, after in (("before", False), ("after", True)):
            store = FaultyStore(inner, [Rule("put", Fail(StorageError("lost"), after=after))])
            with pytest.raises(StorageError, match="lost"):
                store.put(key, [b"."])
        assert inner.list_children() == ["a/", "after"]
        # An operation that failed by itself says so.
        store = FaultyStore(inner, [Rule("put", Fail(StorageError("lost"), after=True))])
        with pytest.raises(AlreadyExists):
            store.put("after", [b"."])

    def test_counts_each_key_of_a_delete(self, inner: Store) -> None:
        store = FaultyStore(inner, [Rule("delete", Fail(StorageError("no")), nth=2)])
        with pytest.raises(StorageError):
            store.delete(["a/x", "a/y"])
        assert inner.list_children("a/") == ["y"]

    def test_listings_match_by_prefix_when_called(self, inner: Store) -> None:
        store = FaultyStore(inner, [Rule("list_entries", Fail(StorageError("no")), key="a/*")])
        assert list(store.list_entries("")) == [Entry("a/x", 10), Entry("a/y", 1)]
        with pytest.raises(StorageError):
            store.list_entries("a/")


class TestHang:
    def test_holds_until_released_and_then_goes_on(self, inner: Store) -> None:
        hang = Hang()
        store = FaultyStore(inner, [Rule("put", hang, key="a/new")])
        store.put("a/other", [b"."])
        thread = threading.Thread(target=store.put, args=("a/new", [b"late"]))
        thread.start()
        hang.reached.wait()
        assert inner.list_children("a/") == ["other", "x", "y"]
        assert thread.is_alive()
        hang.release()
        thread.join()
        assert read_all(inner, "a/new") == b"late"

    def test_may_end_in_an_error(self, inner: Store) -> None:
        hang = Hang()
        hang.release()
        store = FaultyStore(inner, [Rule("size", hang), Rule("size", Fail(StorageError("gone")))])
        with pytest.raises(StorageError, match="gone"):
            store.size("a/x")
        assert hang.reached.is_set()
        assert store.fired == [1, 1]


class TestDamage:
    def test_of_what_is_stored(self, inner: Store) -> None:
        rules = [
            Rule("put", Truncate(3), key="cut"),
            Rule("put", Flip(1), key="flip*"),
            Rule("put", Flip(-1), key="flipped", nth=2),
        ]
        store = FaultyStore(inner, rules)
        source = bytearray(b"abcdef")
        store.put("cut", [source, b"gh"])
        store.put("flipped", [source, b"gh"])
        store.put("flipped", [source, b"gh"], mode="replace")
        assert read_all(inner, "cut") == b"abc"
        assert read_all(inner, "flipped") == b"abcdefgi"
        assert store.fired == [1, 1, 1]
        # The caller's own bytes are as they were.
        assert source == b"abcdef"

    def test_of_what_is_read(self, inner: Store) -> None:
        rules = [Rule("read_into", Truncate(4)), Rule("read_into", Flip(), nth=2)]
        store = FaultyStore(inner, rules)
        assert read(store, "a/x") == b"0123"
        assert read(store, "a/x", offset=4) == b"556789"
        assert read(store, "a/x") == b"0123456789"
        assert read(inner, "a/x") == b"0123456789"

    def test_of_what_is_read_to_several_buffers(self, inner: Store) -> None:
        store = FaultyStore(inner, [Rule("read_into", Flip(-2))])
        parts = [memoryview(bytearray(size)) for size in (3, 6, 1)]
        assert store.read_into("a/x", 0, *parts) == 10
        assert b"".join(parts) == b"0123456799"

    def test_that_would_not_happen_is_a_mistake(self, inner: Store) -> None:
        store = FaultyStore(inner, [Rule("read_into", Flip(10)), Rule("put", Flip(-2))])
        with pytest.raises(UsageError, match="outside the 10 bytes"):
            read(store, "a/x")
        with pytest.raises(UsageError, match="outside the 1 bytes"):
            store.put("new", [b"."])
        assert inner.list_children() == ["a/"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rule("rename", Fail(OSError())),  # type: ignore[arg-type]
        lambda: Rule("put", Fail(OSError()), nth=0),
        lambda: Rule("size", Truncate(3)),
        lambda: Rule("delete", Flip(3)),
        lambda: CrashStore(MemoryStore("stores-test/bad"), at=0),
        lambda: CrashStore(MemoryStore("stores-test/bad"), when="during"),  # type: ignore[arg-type]
    ],
)
def test_rules_that_can_never_apply_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


def save_something(store: Store) -> None:
    """What the crash tests run: three changes, and a look between them."""
    store.put("one", [b"1"])
    store.size("one")
    store.put("two", [b"2"])
    store.delete(["one"])


class TestCrash:
    def test_counts_without_crashing(self, inner: Store) -> None:
        store = CrashStore(inner)
        save_something(store)
        everything = [("put", "one"), ("size", "one"), ("put", "two"), ("delete", "one")]
        assert store.operations == everything
        changes = CrashStore(inner, kinds=CHANGES)
        changes.delete(["one", "two"])
        save_something(changes)
        assert [operation for operation, _ in changes.operations] == [
            *("delete", "delete"),
            *("put", "put", "delete"),
        ]

    @pytest.mark.parametrize(
        ("when", "left"),
        [
            ("before", [[], ["one"], ["one", "two"], ["two"]]),
            ("after", [["one"], ["one", "two"], ["two"], ["two"]]),
        ],
    )
    def test_kills_its_process_at_each_change(
        self, tmp_path: Path, when: str, left: list[list[str]]
    ) -> None:
        script = (
            "import sys\n"
            "from dist_ckpt.storage import LocalStore\n"
            "from dist_ckpt.testing import CHANGES, CrashStore\n"
            "from tests.unit.testing.test_stores import save_something\n"
            "inner = LocalStore(sys.argv[1])\n"
            "at, when = int(sys.argv[2]), sys.argv[3]\n"
            "save_something(CrashStore(inner, at=at, when=when, kinds=CHANGES))\n"
        )
        for at, children in enumerate(left, start=1):
            root = tmp_path / str(at)
            command = [sys.executable, "-c", script, str(root), str(at), when]
            code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
            assert code == (-signal.SIGKILL if at <= 3 else 0)
            assert LocalStore(root).list_children() == children

    def test_sends_another_signal_and_goes_on_if_that_is_handled(self, inner: Store) -> None:
        received: list[int] = []
        old = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
        try:
            store = CrashStore(inner, at=2, signal=signal.SIGUSR1)
            save_something(store)
        finally:
            signal.signal(signal.SIGUSR1, old)
        assert received == [signal.SIGUSR1]
        assert len(store.operations) == 4


def test_latency_waits_once_for_each_operation(inner: Store) -> None:
    waited: list[float] = []
    store = LatencyStore(inner, 0.25, sleep=waited.append)
    for number, operation in enumerate(sorted(OPERATIONS), start=1):
        call_of(operation, store, key=f"a/{'xy'[operation != 'delete']}")()
        assert waited == [0.25] * number


def test_wrappers_are_as_transparent_as_they_can_be(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    (tmp_path / ".tmp-0123456789abcdef").write_bytes(b"half")
    store = FaultyStore(CrashStore(LatencyStore(local, 0.0)), [])
    assert isinstance(store, Sweeper)
    assert store.sweep() == 1
    assert store.url == local.url
    assert store.capabilities == local.capabilities
    assert repr(local) in repr(store)
    assert FaultyStore(MemoryStore("stores-test/sweep"), []).sweep() == 0
