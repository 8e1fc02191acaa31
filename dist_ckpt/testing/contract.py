"""The contract of a store as tests.

Subclass `StoreContract`, say how to make an empty store, and run pytest; its description shows how.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar, overload

import pytest

from dist_ckpt.errors import AlreadyExists, CoordinationError, ErrorKind, NotFound, UsageError
from dist_ckpt.storage.base import Buffer, Capabilities, Entry, PutMode, Store, Sweeper, read_all
from dist_ckpt.testing.contract_names import LargeContract, NamesContract

Piece = Literal["first of one", "first of many", "second"]

# What `Store.put` says of its pieces.
_PIECE_BYTES = 16 << 20


class _Ending:
    """A watch that lets some pieces go and then ends the put."""

    def __init__(self, after: int) -> None:
        self.error = CoordinationError("not wanted any more", kind=ErrorKind.CANCELLED)
        self._left = after

    def __call__(self, nbytes: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise self.error


class WatchContract:
    """What a store must do with the `watch` of a put; part of `StoreContract`.

    Attributes:
        large_bytes: size of the largest object; lower it for a slow backend.
    """

    # More than two pieces, and no multiple of a page or of an item.
    large_bytes = (32 << 20) + 3

    @pytest.mark.parametrize("mode", ["create", "replace"])
    def test_watch_sees_every_byte(self, store: Store, mode: PutMode) -> None:
        """The pieces are not too large to be stopped in between, and none is left out."""
        data = memoryview(bytes(self.large_bytes))
        cuts: list[Sequence[memoryview]] = [[], [data[:10], data[:0], data[10:70_000]]]
        # Cut where neither a piece nor a page ends.
        cuts.append([data[:1], data[1:-5_000_001], data[-5_000_001:]])
        for number, buffers in enumerate(cuts):
            seen: list[int] = []
            store.put(f"a/{number}", buffers, mode=mode, watch=seen.append)
            nbytes = sum(map(len, buffers))
            # What is sent again after a failure may be told again.
            assert sum(seen) >= nbytes
            assert store.size(f"a/{number}") == nbytes
            # Where uploads have parts, these are the pieces, of whatever size.
            if store.capabilities.max_part_bytes is None:
                assert all(0 < size <= _PIECE_BYTES for size in seen)

    @pytest.mark.parametrize("old", [b"old", None])
    @pytest.mark.parametrize("piece", ["first of one", "first of many", "second"])
    def test_watch_that_raises_ends_the_put(
        self, store: Store, piece: Piece, old: bytes | None
    ) -> None:
        """Its error passes as it is, nothing is stored or replaced, and nothing is left behind."""
        data = bytes(1 if piece == "first of one" else self.large_bytes)
        after = 1 if piece == "second" else 0
        # How many pieces there are is the store's affair: counted with nothing to end it.
        if after:
            pieces: list[int] = []
            store.put("a/k", [data], watch=pieces.append)
            store.delete(["a/k"])
            if len(pieces) <= after:
                pytest.skip("the store takes the object in one piece")
        if old is not None:
            store.put("a/k", [old])
        ending = _Ending(after)
        with pytest.raises(CoordinationError) as caught:
            store.put("a/k", [data], mode="replace", watch=ending)
        # The very one: why somebody gives a save up must not become a StorageError.
        assert caught.value is ending.error
        if old is not None:
            assert read_all(store, "a/k") == old
        else:
            assert list(store.list_entries()) == []
            assert store.list_children() == []
        # Neither in a listing nor as a leftover, which no listing shows.
        if isinstance(store, Sweeper):
            assert store.sweep() == 0
        # Whatever was begun of it, the key can be used as before.
        store.put("a/k", [b"new"], mode="replace")
        assert read_all(store, "a/k") == b"new"


# All of the contract: what a module of tests derives its own class from.


_T = TypeVar("_T")


class _FailingSource(Sequence[Buffer]):
    """A sequence whose last buffer cannot be had."""

    def __len__(self) -> int:
        return 3

    @overload
    def __getitem__(self, index: int) -> Buffer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Buffer]: ...
    def __getitem__(self, index: int | slice) -> Buffer | Sequence[Buffer]:
        if isinstance(index, slice) or index >= 2:
            # No IndexError, by which a sequence would only end.
            raise ArithmeticError("this buffer cannot be had")
        return b"x" * 100_000


class StoreContract(LargeContract, NamesContract, WatchContract):
    """The tests of a `Store`: every sentence of `dist_ckpt.storage.base` as one or more of them.

    In a module of tests, with a store that is there already in the place of yours:

    ```python
    from collections.abc import Iterator

    import pytest
    from dist_ckpt.storage import MemoryStore, Store
    from dist_ckpt.testing import StoreContract


    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self) -> Iterator[Store]:
            store = MemoryStore("mine")
            yield store
            store.close()
    ```

    Attributes:
        large_bytes: size of the largest object; lower it for a slow backend.
        writers: how many race to create one key.
    """

    writers = 16

    # ------------------------------------------------------------ what it is

    def test_is_a_store_that_says_where_it_is(self, store: Store) -> None:
        """It has the methods and attributes of the protocol."""
        assert isinstance(store, Store)
        assert isinstance(store.capabilities, Capabilities)
        assert store.url
        assert isinstance(store.url, str)

    def test_empty_store_lists_nothing(self, store: Store) -> None:
        """A place where nothing was put is an empty store, whether or not it exists."""
        assert list(store.list_entries()) == []
        assert store.list_children() == []
        assert list(store.list_entries("no/such/")) == []
        assert store.list_children("no/such/") == []
        with pytest.raises(NotFound):
            store.size("a")
        store.delete(["a", "b/c"])

    # ------------------------------------------------------------ put and read

    @pytest.mark.parametrize(
        "buffers",
        [
            pytest.param([], id="none"),
            pytest.param([b""], id="one-empty"),
            pytest.param([b"", bytearray(), memoryview(b"")], id="empty-ones"),
            pytest.param([b"ab", b"", bytearray(b"cd"), memoryview(b"-ef-")[1:3]], id="all-kinds"),
            pytest.param((b"in", b"a", b"tuple"), id="tuple"),
            pytest.param([memoryview(bytes(24)).cast("d")], id="items-of-8-bytes"),
            pytest.param([memoryview(bytes(24)).cast("B", (2, 3, 4))], id="three-dimensions"),
            pytest.param([memoryview(bytearray(8))[:0].cast("i")], id="empty-of-4-byte-items"),
            pytest.param([bytes([n % 251]) * (n % 7) for n in range(5000)], id="many"),
        ],
    )
    def test_put_stores_the_concatenation(self, store: Store, buffers: Sequence[Buffer]) -> None:
        """Any sequence of any contiguous buffers, empty ones too, is one object."""
        expected = b"".join(bytes(buffer) for buffer in buffers)
        store.put("a/b", buffers)
        assert store.size("a/b") == len(expected)
        assert read_all(store, "a/b") == expected

    def test_large_object(self, store: Store, other: Store) -> None:
        """An object of many megabytes in buffers of uneven sizes comes back whole."""
        # Unlike from place to place, so that what went to a wrong one shows.
        block = bytes(range(256)) * 4096
        data = memoryview((block * (self.large_bytes // len(block) + 1))[: self.large_bytes])
        store.put("large", [data[:1], data[1:-5_000_001], data[-5_000_001:]])
        assert other.size("large") == self.large_bytes
        target = bytearray(self.large_bytes)
        assert other.read_into("large", 0, memoryview(target)) == self.large_bytes
        assert target == data

    @pytest.mark.parametrize(
        ("offset", "wanted", "expected"),
        [
            (0, 10, b"0123456789"),
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (9, 1, b"9"),
            (6, 10, b"6789"),
            (0, 0, b""),
            (10, 5, b""),
            (10, 0, b""),
            (1 << 40, 5, b""),
        ],
    )
    def test_reads_at_offsets(
        self, store: Store, offset: int, wanted: int, expected: bytes
    ) -> None:
        """The buffer is filled from the offset on; the count is short only at the end."""
        store.put("k", [b"01234", b"56789"])
        target = bytearray(b"." * (wanted + 2))
        assert store.read_into("k", offset, memoryview(target)[1 : 1 + wanted]) == len(expected)
        # Not a byte before or behind the buffer, nor behind what there was, is touched.
        assert target == b"." + expected + b"." * (wanted - len(expected) + 1)

    def test_read_fills_items_of_any_size(self, store: Store) -> None:
        """The buffer may hold items of several bytes; the count is of bytes."""
        store.put("k", [bytes(range(16))])
        target = memoryview(bytearray(16)).cast("I")
        assert store.read_into("k", 0, target) == 16
        assert target.tobytes() == bytes(range(16))

    @pytest.mark.parametrize("offset", [0, 3])
    def test_reads_to_several_buffers(self, store: Store, offset: int) -> None:
        """Buffers are filled one after another, as if they were one, up to the end."""
        store.put("k", [b"0123456789"])
        target = bytearray(b"." * 24)
        view = memoryview(target)
        buffers = [view[1:4], view[4:4], view[8:12].cast("I"), view[13:21]]
        assert store.read_into("k", offset, *buffers) == 10 - offset
        filled = bytes(target[1:4] + target[8:12] + target[13:21])
        assert filled == b"0123456789"[offset:] + b"." * (5 + offset)
        assert target.count(b".") == 24 - (10 - offset)
        assert store.read_into("k", 0) == 0

    def test_read_refuses_bad_arguments(self, store: Store) -> None:
        """A negative offset and a buffer that cannot be filled are mistakes of the caller."""
        store.put("k", [b"0123456789"])
        with pytest.raises(UsageError, match="offset"):
            store.read_into("k", -1, memoryview(bytearray(4)))
        with pytest.raises(UsageError, match="read-only"):
            store.read_into("k", 0, memoryview(b"1234"))
        with pytest.raises(UsageError, match="contiguous"):
            store.read_into("k", 0, memoryview(bytearray(8))[::2])
        with pytest.raises(UsageError, match="read-only"):
            store.read_into("k", 0, memoryview(bytearray(4)), memoryview(b"1234"))

    def test_missing_key_is_not_found(self, store: Store) -> None:
        """What does not exist, a folder and what would be below an object are no keys."""
        store.put("a/b", [b"1"])
        for key in ("x", "a/x", "a", "a/b/c"):
            with pytest.raises(NotFound, match=key):
                store.size(key)
            with pytest.raises(NotFound, match=key):
                store.read_into(key, 0, memoryview(bytearray(1)))

    # ------------------------------------------------------------ create and replace

    def test_create_never_touches_what_exists(self, store: Store, other: Store) -> None:
        """`mode="create"` is the default, and refuses a key that exists, even with equal bytes."""
        store.put("a/k", [b"first"])
        with pytest.raises(AlreadyExists, match="a/k"):
            other.put("a/k", [b"second"], mode="create")
        with pytest.raises(AlreadyExists, match="a/k"):
            other.put("a/k", [b"first"])
        assert read_all(store, "a/k") == b"first"
        assert list(store.list_entries()) == [Entry("a/k", 5)]

    def test_create_again_after_delete(self, store: Store) -> None:
        """A deleted key is free."""
        for data in (b"one", b"two"):
            store.put("a/k", [data])
            assert read_all(store, "a/k") == data
            store.delete(["a/k"])

    def test_replace(self, store: Store, other: Store) -> None:
        """`mode="replace"` creates, or replaces the whole object by a shorter or longer one."""
        for data in (b"long enough", b"short", b"", b"longer than before"):
            store.put("a/k", [data], mode="replace")
            assert read_all(other, "a/k") == data
        assert [entry.key for entry in store.list_entries()] == ["a/k"]

    def test_racing_creators_have_one_winner(self, store: Store, other: Store) -> None:
        """Among many writers that start at once, one wins and its bytes stay."""
        if not store.capabilities.atomic_create:
            pytest.skip("the store declares that its create is not atomic")

        def create(key: str, number: int) -> bool:
            try:
                # By two ways to the place, as from two hosts.
                (store, other)[number % 2].put(key, [bytes([number])] * 1000)
            except AlreadyExists:
                return False
            return True

        # Folders that are not there yet are made by all writers at once.
        for key in ("race", "new/folder/race", "new/folder/again"):
            won = _at_once(self.writers, partial(create, key))
            assert sum(won) == 1, f"{sum(won)} writers of {key} were told that they created it"
            assert read_all(other, key) == bytes([won.index(True)]) * 1000
        assert len(list(store.list_entries())) == 3

    # ------------------------------------------------------------ whole or not at all

    @pytest.mark.parametrize("old", [b"old", None])
    def test_failing_source_leaves_nothing(self, store: Store, old: bytes | None) -> None:
        """When a buffer cannot be had, its error passes and nothing is stored nor replaced."""
        if old is not None:
            store.put("a/k", [old])
        with pytest.raises(ArithmeticError):
            store.put("a/k", _FailingSource(), mode="replace")
        if old is not None:
            assert read_all(store, "a/k") == old
        else:
            with pytest.raises(NotFound):
                store.size("a/k")
            assert store.list_children() == []

    def test_bad_buffers_are_refused(self, store: Store) -> None:
        """What is no sequence of contiguous buffers is refused, and nothing is stored."""
        # `bytes` is a sequence, too: of its numbers.
        bad: list[object] = [b"bytes", bytearray(b"x"), memoryview(b"x"), "text", 5, iter([b"x"])]
        bad += [["text"], [b"x", 5], [memoryview(b"abcd")[::2]]]
        for buffers in bad:
            with pytest.raises(UsageError):
                store.put("a/k", buffers)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="mode"):
            store.put("a/k", [b"x"], mode="append")  # type: ignore[arg-type]
        assert list(store.list_entries()) == []

    def test_no_part_of_an_object_is_ever_seen(self, store: Store, other: Store) -> None:
        """Readers beside a writer see old bytes or new ones, of the old size or the new."""
        # Of two sizes, so that a mixture shows by its length as well.
        versions = [bytes([n]) * size for n, size in enumerate((700_000, 1_400_000))]
        sizes = {len(data) for data in versions}
        store.put("a/k", [versions[0]])
        done = threading.Event()

        def write() -> None:
            try:
                for turn in range(1, 12):
                    data = memoryview(versions[turn % 2])
                    # Many, so that there are moments in between.
                    pieces = [data[at : at + 50_000] for at in range(0, len(data), 50_000)]
                    store.put("a/k", pieces, mode="replace")
            finally:
                done.set()

        def read() -> None:
            target = bytearray(2_000_000)
            finished = False
            while not finished:
                # Looked at first, so that the last version is read at least once.
                finished = done.is_set()
                count = other.read_into("a/k", 0, memoryview(target))
                assert target[:count] in versions, f"{count} bytes of a mixture were read"
                assert other.size("a/k") in sizes
                assert {entry.nbytes for entry in other.list_entries("a/")} <= sizes
                assert other.list_children("a/") == ["k"]

        _at_once(4, lambda number: write() if number == 0 else read())

    # ------------------------------------------------------------ several threads

    def test_concurrent_use(self, store: Store, other: Store) -> None:
        """Threads that put, read, list and delete in the same folders do not disturb each other."""

        def work(number: int) -> None:
            mine = (store, other)[number % 2]
            for turn in range(10):
                data = bytes([number, turn]) * 500
                shared, own = f"shared/x/{number}", f"own-{number}/deep/{turn}"
                mine.put(shared, [data])
                mine.put(own, [data])
                assert read_all(mine, shared) == data
                assert Entry(shared, len(data)) in list(mine.list_entries("shared/"))
                assert f"own-{number}/" in mine.list_children()
                # Whoever deletes the last key of a folder races with whoever begins one in it.
                mine.delete([shared, own])
                assert f"own-{number}/" not in mine.list_children()

        _at_once(8, work)
        assert store.list_children() == []

    def test_concurrent_reads_of_one_object(self, store: Store) -> None:
        """Ranges of one object are read by several threads, each into its own place."""
        data = bytes(range(256)) * 1000
        store.put("k", [data])
        target = bytearray(len(data))

        def read(number: int) -> None:
            stripe = memoryview(target)[number * 32_000 : (number + 1) * 32_000]
            assert store.read_into("k", number * 32_000, stripe) == len(stripe)

        _at_once(8, read)
        assert target == data


def _at_once(count: int, work: Callable[[int], _T]) -> list[_T]:
    """Run `work(0)` to `work(count - 1)` in threads that start together; return their results."""
    start = threading.Barrier(count)

    def run(number: int) -> _T:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        # Every result is collected, so a failure in any thread fails the test.
        return list(pool.map(run, range(count)))
