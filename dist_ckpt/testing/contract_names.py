"""The contract of a store as tests: names, and large objects."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Literal

import pytest

from dist_ckpt.errors import AlreadyExists, NotFound, UsageError
from dist_ckpt.storage.base import Entry, PutMode, Store, Sweeper, delete_exactly, read_all

BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/./b",
    "../a",
    "a/../b",
    # The slash alone separates: elsewhere this would be a folder.
    "a\\b",
    "a\nb",
    "a\0b",
    "a\x7fb",
    # So begin what writers leave unfinished: a sweep may remove it.
    ".tmp-a",
    "a/.tmp-a",
    # Half a character, which UTF-8 does not have: no URL and no manifest could name it.
    "a\udc80b",
)
"""Keys that every store refuses in every method."""

GOOD_KEYS = (
    "a",
    "a.b-c_d",
    "step-0000001000/manifest.json",
    "deep/er/and/deep/er/still",
    "with space/and+plus%20percent",
    "#hash?question&amp=1",
    "ünïcödé/шаг/步骤/🙂",
    # Two code points, which some file systems make one of.
    "e\u0301/combining",
    # Not every file system tells it from `upper/lower`.
    "UPPER/lower",
    # One dot or two lead elsewhere, three are a name.
    "...",
    "..a/b..",
    "'quoted\"",
    "x" * 200,
)
"""Keys that every store takes, gives back unchanged, and tells apart."""


class NamesContract:
    """What a store must do about keys; part of `StoreContract`, which is what to subclass."""

    @pytest.fixture
    def store(self) -> Store | Iterator[Store]:
        """An empty store; every subclass says which."""
        raise NotImplementedError("a subclass of StoreContract defines the fixture 'store'")

    @pytest.fixture
    def other(self, store: Store) -> Store:
        """Another way to the same place, as from another host; by default the same store."""
        return store

    # ------------------------------------------------------------ keys

    @pytest.mark.parametrize("key", GOOD_KEYS)
    def test_round_trip_under_any_good_key(self, store: Store, other: Store, key: str) -> None:
        """The bytes come back under the key that was given, and the key is listed as given."""
        store.put(key, [b"one", b"two"])
        assert read_all(other, key) == b"onetwo"
        assert other.size(key) == 6
        assert list(other.list_entries()) == [Entry(key, 6)]
        store.delete([key])
        assert list(other.list_entries()) == []

    def test_good_keys_do_not_collide(self, store: Store) -> None:
        """Keys that differ in anything are different keys."""
        # Likenesses of good ones: another case, another composition, another escape.
        keys = [*GOOD_KEYS, "upper/lower", "\u00e9/combining", "with space/and plus%20percent"]
        for key in keys:
            store.put(key, [key.encode()])
        assert [entry.key for entry in store.list_entries()] == sorted(keys)
        assert all(read_all(store, key) == key.encode() for key in keys)

    # ------------------------------------------------------------ listings

    def test_entries_are_those_below_the_prefix_in_order(self, store: Store) -> None:
        """Sorted by code point over the whole key; a prefix is a folder, not a beginning."""
        # Around the slash in the order of code points: `!` and `-` are before it, `0` is behind.
        keys = ["a/b/c", "a-b", "a/b-", "a0", "a/b/a/z", "b", "a!", "ab/c", "a/é", "a/z", "A/b"]
        for size, key in enumerate(keys):
            store.put(key, [bytes(size)])
        entries = list(store.list_entries())
        assert entries == sorted(entries, key=lambda entry: entry.key)
        assert {entry.key: entry.nbytes for entry in entries} == {
            key: size for size, key in enumerate(keys)
        }
        assert [entry.key for entry in store.list_entries("a/")] == sorted(
            key for key in keys if key.startswith("a/")
        )
        assert [entry.key for entry in store.list_entries("a/b/")] == ["a/b/a/z", "a/b/c"]
        assert list(store.list_entries("b/")) == []

    def test_children_are_one_level_below_the_prefix(self, store: Store) -> None:
        """Objects by their names, folders by theirs and a slash, each once, sorted."""
        for key in ("f/b/1", "f/b/2", "f/b/c/3", "f/a", "f/b-", "g/x/y", "top"):
            store.put(key, [b"."])
        assert store.list_children() == ["f/", "g/", "top"]
        assert store.list_children("f/") == ["a", "b-", "b/"]
        assert store.list_children("f/b/") == ["1", "2", "c/"]
        assert store.list_children("g/") == ["x/"]
        assert store.list_children("top/") == []

    def test_folder_without_objects_is_not_listed(self, store: Store, other: Store) -> None:
        """A folder is there as long as an object is below it."""
        store.put("a/b/c/d", [b"."])
        store.put("a/x", [b"."])
        store.delete(["a/b/c/d"])
        assert other.list_children() == ["a/"]
        assert other.list_children("a/") == ["x"]
        store.delete(["a/x"])
        assert other.list_children() == []

    def test_listing_contains_what_was_put_before(self, store: Store, other: Store) -> None:
        """Every key whose put returned is in a listing that starts later."""
        if not store.capabilities.strong_list:
            pytest.skip("the store declares that its listings may lag")
        keys: list[str] = []
        for number in range(60):
            keys.append(f"d{number % 3}/k{number:03}")
            store.put(keys[-1], [b"."])
            assert [entry.key for entry in other.list_entries()] == sorted(keys)
        assert other.list_children("d1/") == [f"k{number:03}" for number in range(1, 60, 3)]

    # ------------------------------------------------------------ delete

    def test_delete_removes_the_given_keys_only(self, store: Store, other: Store) -> None:
        """A key that does not exist, a folder and a repeated key are no error."""
        for key in ("a/1", "a/2", "a/3", "b/1"):
            store.put(key, [b"."])
        store.delete(["a/2", "a/2", "a", "no/such", "b/1", "a/1/below"])
        assert [entry.key for entry in other.list_entries()] == ["a/1", "a/3"]
        with pytest.raises(NotFound):
            other.size("a/2")
        store.delete([])

    def test_delete_takes_a_listing_that_goes_on(self, store: Store) -> None:
        """The keys may come straight from a listing of the same store."""
        for number in range(30):
            store.put(f"a/{number % 4}/{number}", [b"."])
        store.put("b", [b"."])
        store.delete(entry.key for entry in store.list_entries("a/"))
        assert list(store.list_entries()) == [Entry("b", 1)]

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_key_is_refused_by_every_method(self, store: Store, key: str) -> None:
        """No method takes a key that is not inside the store, and none does anything then."""
        store.put("a/b", [b"."])
        with pytest.raises(UsageError):
            store.put(key, [b"x"])
        with pytest.raises(UsageError):
            store.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(UsageError):
            store.size(key)
        with pytest.raises(UsageError):
            store.delete([key])
        for prefix in {key, key + "/"} - {"", "a/"}:
            with pytest.raises(UsageError):
                list(store.list_entries(prefix))
            with pytest.raises(UsageError):
                store.list_children(prefix)
        assert list(store.list_entries()) == [Entry("a/b", 1)]

    def test_lone_key_and_open_prefix_are_refused(self, store: Store) -> None:
        """`delete("ab")` would delete "a" and "b"; a prefix without a slash is half a name."""
        store.put("a", [b"."])
        with pytest.raises(UsageError):
            store.delete("a")
        with pytest.raises(UsageError):
            list(store.list_entries("a"))
        with pytest.raises(UsageError):
            store.list_children("a")
        assert store.size("a") == 1

    @pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")])
    def test_object_and_folder_of_one_name(self, store: Store, first: str, second: str) -> None:
        """Either both are held, or the second is refused and the first is untouched."""
        store.put(first, [b"1"])
        # A replace may not make room for a folder, either.
        for mode in ("create", "replace"):
            try:
                store.put(second, [b"22"], mode=mode)
            except AlreadyExists:
                assert mode == "create"
                pytest.fail(f"{second} was never put, but is said to exist")
            except UsageError:
                assert list(store.list_entries()) == [Entry(first, 1)]
            else:
                assert read_all(store, second) == b"22"
                store.delete([second])
        assert read_all(store, first) == b"1"


# Large objects, aligned memory, and what killed writers left.


Cut = Literal["whole", "aligned", "odd"]


class LargeContract:
    """What a store must do that splits an object into pieces; part of `StoreContract`.

    Attributes:
        large_bytes: size of the largest object; lower it for a slow backend.
    """

    large_bytes = (32 << 20) + 3

    def test_capabilities_are_sound(self, store: Store) -> None:
        """Limits are sizes in bytes, or None where there is none."""
        able = store.capabilities
        for flag in (able.atomic_create, able.strong_list, able.durable, able.direct_io):
            assert isinstance(flag, bool)
        for limit in (able.max_part_bytes, able.max_object_bytes):
            assert limit is None or limit >= self.large_bytes

    @pytest.mark.parametrize("cut", ["whole", "aligned", "odd"])
    def test_large_object_from_page_aligned_memory(self, store: Store, cut: Cut) -> None:
        """Written from the begin of a page or not, read to the begin of a page or not."""
        data = _fill(memoryview(mmap.mmap(-1, self.large_bytes)))
        found = memoryview(mmap.mmap(-1, self.large_bytes + mmap.PAGESIZE))
        # Pieces that begin on a page, and ones that do not.
        step = {"whole": self.large_bytes, "aligned": 5 << 20, "odd": (3 << 20) + 5}[cut]
        starts = range(0, self.large_bytes, step)
        store.put("large", [data[start : start + step] for start in starts])
        # In memory, too: what does not begin on a page is not read there without a copy.
        first = 1 if cut == "odd" else 0
        stop = first + self.large_bytes
        for start in starts:
            piece = found[first + start : min(first + start + step, stop)]
            assert store.read_into("large", start, piece) == len(piece)
        assert found[first:stop] == data
        assert not any(found[stop:])

    @pytest.mark.parametrize(("first", "size"), [(1, 9 << 20), (4096, 8 << 20), (-9, 9), (-5, 99)])
    def test_ranges_of_a_large_object(self, store: Store, first: int, size: int) -> None:
        """What lies between two bytes is read, and not a byte of the memory around is touched."""
        data = bytes(_fill(memoryview(bytearray(self.large_bytes))))
        store.put("large", [data])
        start = first % self.large_bytes
        expected = data[start : start + size]
        found = bytearray(b"." * (size + 2))
        assert store.read_into("large", start, memoryview(found)[1 : 1 + size]) == len(expected)
        assert found == b"." + expected + b"." * (size - len(expected) + 1)

    @pytest.mark.parametrize("step", [1 << 20, (1 << 20) + 5])
    def test_large_object_to_several_buffers(self, store: Store, step: int) -> None:
        """Buffers that begin on a page, of whole pages or not, with memory between them."""
        data = bytes(_fill(memoryview(bytearray(self.large_bytes))))
        store.put("large", [data])
        memory = memoryview(mmap.mmap(-1, 3 * self.large_bytes))
        apart = -(-step // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
        count = -(-self.large_bytes // step)
        # One more than there is: the last ones stay as they are.
        buffers = [memory[n * apart : n * apart + step] for n in range(count + 1)]
        assert store.read_into("large", 0, *buffers) == self.large_bytes
        assert b"".join(buffers)[: self.large_bytes] == data
        assert not any(b"".join(buffers)[self.large_bytes :])
        assert not any(any(memory[n * apart + step : (n + 1) * apart]) for n in range(count))

    @pytest.mark.parametrize("mode", ["create", "replace"])
    def test_large_object_that_exists(self, store: Store, other: Store, mode: PutMode) -> None:
        """However an object goes up, creating it again is refused, and replacing replaces all."""
        old = bytes(_fill(memoryview(bytearray(self.large_bytes))))
        store.put("a/large", [old])
        new = memoryview(old)[1:-1]
        if mode == "create":
            with pytest.raises(AlreadyExists, match="a/large"):
                other.put("a/large", [new])
        else:
            other.put("a/large", [new], mode="replace")
        assert read_all(store, "a/large") == (old if mode == "create" else new)
        assert [entry.key for entry in store.list_entries()] == ["a/large"]

    def test_sweep_leaves_what_is_listed(self, store: Store) -> None:
        """Only what killed writers left is removed, and here there were none."""
        if not isinstance(store, Sweeper):
            pytest.skip("the store declares that nothing is ever left behind")
        for key in ("a/b", "a/c/d", "e"):
            store.put(key, [b"."])
        for prefix in ("", "a/", "no/such/"):
            assert store.sweep(prefix) == 0
        assert [entry.key for entry in store.list_entries()] == ["a/b", "a/c/d", "e"]

    def test_exact_deletion_takes_nothing_else(self, store: Store, other: Store) -> None:
        """An object goes only while it holds exactly the bytes that were found in it."""
        store.put("a/k", [b"old"])
        # Empty, a beginning, longer, and of the same length.
        for data in (b"", b"ol", b"old!", b"new"):
            assert not delete_exactly(store, "a/k", data)
        other.put("a/k", [b"new"], mode="replace")
        assert not delete_exactly(store, "a/k", b"old")
        assert [entry.key for entry in other.list_entries()] == ["a/k"]
        assert delete_exactly(store, "a/k", b"new")
        assert not delete_exactly(store, "a/k", b"new")
        assert other.list_children() == []


def _fill(view: memoryview) -> memoryview:
    """Write bytes into `view` that are not the same in any two of its pieces; return it."""
    block = bytes(range(251)) * 4177  # a little over 1 MiB, and no multiple of a page
    for start in range(0, view.nbytes, len(block)):
        size = min(len(block), view.nbytes - start)
        view[start : start + size] = block[:size]
        view[start] = start // len(block) % 256
    return view
