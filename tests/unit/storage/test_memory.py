"""What is special about a store in memory: its named spaces."""

from __future__ import annotations

import pytest

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import MemoryStore, read_all


def test_stores_of_one_name_share_their_objects() -> None:
    one, two = MemoryStore("memory-test/shared"), MemoryStore("memory-test/shared")
    one.put("key", [b"data"])
    one.close()
    assert read_all(two, "key") == b"data"
    two.delete(["key"])
    assert list(MemoryStore("memory-test/shared").list_entries()) == []


def test_names_are_apart_even_below_one_another() -> None:
    outer, inner = MemoryStore("memory-test/outer"), MemoryStore("memory-test/outer/inner")
    inner.put("key", [b"."])
    assert list(outer.list_entries()) == []
    assert outer.list_children() == []
    inner.delete(["key"])


def test_what_was_put_is_a_copy() -> None:
    store = MemoryStore("memory-test/copy")
    data = bytearray(b"before")
    store.put("key", [data], mode="replace")
    data[:] = b"after!"
    assert read_all(store, "key") == b"before"


def test_says_what_it_is() -> None:
    store = MemoryStore("memory-test/says")
    assert store.url == "memory://memory-test/says"
    assert repr(store) == "MemoryStore('memory-test/says')"
    assert not store.capabilities.durable
    assert store.capabilities.atomic_create


@pytest.mark.parametrize("name", ["", "/", "a/", "../a", "a//b"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        MemoryStore(name)
