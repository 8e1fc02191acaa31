"""The half of the store contract that is about names: keys, listings, deletion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_ckpt.errors import AlreadyExists, NotFound, UsageError
from dist_ckpt.storage.base import Entry, Store, read_all

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
    "a\\b",
    "a\nb",
    "a\0b",
    "a\x7fb",
    ".tmp-a",
    "a/.tmp-a",
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
    "e\u0301/combining",
    "UPPER/lower",
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
        keys = [*GOOD_KEYS, "upper/lower", "\u00e9/combining", "with space/and plus%20percent"]
        for key in keys:
            store.put(key, [key.encode()])
        assert [entry.key for entry in store.list_entries()] == sorted(keys)
        assert all(read_all(store, key) == key.encode() for key in keys)

    # ------------------------------------------------------------ listings

    def test_entries_are_those_below_the_prefix_in_order(self, store: Store) -> None:
        """Sorted by code point over the whole key; a prefix is a folder, not a beginning."""
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
