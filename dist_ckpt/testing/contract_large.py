"""The part of the store contract that is about large objects, aligned memory and leftovers."""

from __future__ import annotations

import mmap
from typing import Literal

import pytest

from dist_ckpt.errors import AlreadyExists
from dist_ckpt.storage.base import PutMode, Store, Sweeper, delete_exactly, read_all

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
        step = {"whole": self.large_bytes, "aligned": 5 << 20, "odd": (3 << 20) + 5}[cut]
        starts = range(0, self.large_bytes, step)
        store.put("large", [data[start : start + step] for start in starts])
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
