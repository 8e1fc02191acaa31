"""The part of the store contract that is about watching a put, and ending it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.storage.base import PutMode, Store, Sweeper, read_all

Piece = Literal["first of one", "first of many", "second"]

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

    large_bytes = (32 << 20) + 3

    @pytest.mark.parametrize("mode", ["create", "replace"])
    def test_watch_sees_every_byte(self, store: Store, mode: PutMode) -> None:
        """The pieces are not too large to be stopped in between, and none is left out."""
        data = memoryview(bytes(self.large_bytes))
        cuts: list[Sequence[memoryview]] = [[], [data[:10], data[:0], data[10:70_000]]]
        cuts.append([data[:1], data[1:-5_000_001], data[-5_000_001:]])
        for number, buffers in enumerate(cuts):
            seen: list[int] = []
            store.put(f"a/{number}", buffers, mode=mode, watch=seen.append)
            nbytes = sum(map(len, buffers))
            assert sum(seen) >= nbytes
            assert store.size(f"a/{number}") == nbytes
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
        assert caught.value is ending.error
        if old is not None:
            assert read_all(store, "a/k") == old
        else:
            assert list(store.list_entries()) == []
            assert store.list_children() == []
        if isinstance(store, Sweeper):
            assert store.sweep() == 0
        store.put("a/k", [b"new"], mode="replace")
        assert read_all(store, "a/k") == b"new"
