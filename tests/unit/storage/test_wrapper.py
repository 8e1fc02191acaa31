"""A stack of all wrappers is as good a store as what it wraps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from dist_ckpt.storage import (
    LimitStore,
    LocalStore,
    MemoryStore,
    MeterStore,
    RetryStore,
    SingleWriterStore,
    Store,
    StoreWrapper,
)
from dist_ckpt.storage.wrapper import Operation
from dist_ckpt.testing import StoreContract

_T = TypeVar("_T")
_numbers = itertools.count()


def wrapped(inner: Store) -> Store:
    limited = LimitStore(SingleWriterStore(inner), max_concurrent=8, max_bytes_per_second=1e15)
    return MeterStore(RetryStore(limited))


class TestMemoryInside(StoreContract):
    large_bytes = 6 << 20

    @pytest.fixture
    def inner(self) -> MemoryStore:
        return MemoryStore(f"wrapped/{next(_numbers)}")

    @pytest.fixture
    def store(self, inner: MemoryStore) -> Store:
        return wrapped(inner)

    @pytest.fixture
    def other(self, inner: MemoryStore) -> Store:
        return wrapped(inner)


class _Noting(StoreWrapper):
    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.noted: list[tuple[Operation, str]] = []

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        self.noted.append((operation, key))
        return run()


def test_keys_are_deleted_in_batches() -> None:
    store = _Noting(MemoryStore("wrapped/batches"))
    store.delete(f"k{number:04}" for number in range(2500))
    assert store.noted == [("delete", "k0000"), ("delete", "k1000"), ("delete", "k2000")]
    store.noted.clear()
    store.delete([])
    assert store.noted == []


def test_what_the_inner_store_offers_besides_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123456789abcdef").touch()
    inner = RetryStore(LocalStore(tmp_path))
    store = wrapped(inner)
    assert isinstance(store, StoreWrapper)
    assert store.retries == 0
    assert store.sweep() == 1
    assert store.capabilities == inner.capabilities
    assert store.url == str(tmp_path)
    assert repr(store).startswith("MeterStore(RetryStore(LimitStore(")
    store.close()
