"""Objects that are read as a whole, without a question for their size where that can be."""

from __future__ import annotations

import pytest

from dist_ckpt.errors import IntegrityError
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import CrashStore


@pytest.mark.parametrize("nbytes", [0, 1, 100])
def test_what_is_no_larger_than_likely_is_one_request(nbytes: int) -> None:
    store = CrashStore(MemoryStore(f"read_all/small-{nbytes}"))
    store.put("k", [bytes(range(nbytes))], mode="replace")
    assert read_all(store, "k", likely_bytes=100) == bytes(range(nbytes))
    assert [kind for kind, _ in store.operations] == ["put", "read_into"]


@pytest.mark.parametrize("nbytes", [101, 5000])
def test_what_is_larger_is_read_too(nbytes: int) -> None:
    store = MemoryStore(f"read_all/large-{nbytes}")
    store.put("k", [b"x" * nbytes], mode="replace")
    assert read_all(store, "k", likely_bytes=100) == b"x" * nbytes


def test_what_is_replaced_meanwhile_is_of_one_version() -> None:
    class Replaced(MemoryStore):
        def size(self, key: str) -> int:
            self.put(key, [b"new" * 1000], mode="replace")
            return super().size(key)

    store = Replaced("read_all/replaced")
    store.put("k", [b"old" * 1000], mode="replace")
    assert read_all(store, "k", likely_bytes=100) == b"new" * 1000


@pytest.mark.parametrize("likely", [10, 1000])
def test_more_than_there_can_be_is_refused(likely: int) -> None:
    store = MemoryStore("read_all/limit")
    store.put("k", [bytes(500)], mode="replace")
    with pytest.raises(IntegrityError, match="500 bytes, more than the 400"):
        read_all(store, "k", likely_bytes=likely, limit_bytes=400)
