"""Every store of this package, and every wrapper of one, keeps the one contract."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dist_ckpt.storage import LocalStore, MemoryStore, Store
from dist_ckpt.testing import CrashStore, FaultyStore, LatencyStore, StoreContract

_numbers = itertools.count()


def _new_memory() -> MemoryStore:
    return MemoryStore(f"contract/{next(_numbers)}")


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "not" / "there yet")

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return LocalStore(store.url)


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return _new_memory()

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return MemoryStore(store.url.removeprefix("memory://"))


class TestWrappers(StoreContract):
    """A wrapper with nothing to do, and a stack of all of them, is as good as what it wraps."""

    large_bytes = 6 << 20

    @pytest.fixture
    def store(self) -> Store:
        quick = LatencyStore(_new_memory(), 0.25, sleep=lambda seconds: None)
        return FaultyStore(CrashStore(quick), [])
