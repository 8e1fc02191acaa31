"""Stores that are allowed less, or promised more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ckpt.errors import ErrorKind, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import (
    FsspecStore,
    LocalStore,
    MemoryStore,
    ReadOnlyStore,
    SingleWriterStore,
    read_all,
)


def test_read_only_store_reads_and_changes_nothing(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    inner.put("a/k", [b"data"])
    store = ReadOnlyStore(inner)
    assert read_all(store, "a/k") == b"data"
    assert store.list_children() == ["a/"]
    assert store.capabilities == inner.capabilities
    changes: list[Callable[[], object]] = [
        lambda: store.put("b", [b"."]),
        lambda: store.put("a/k", [b"."], mode="replace"),
        lambda: store.delete(["a/k"]),
        lambda: store.delete([]),
        lambda: store.sweep(),
    ]
    for change in changes:
        with pytest.raises(StorageError, match="read-only") as caught:
            change()
        assert caught.value.kind == ErrorKind.PERMISSION
    assert read_all(inner, "a/k") == b"data"


def test_single_writer_is_a_promise_about_create_only() -> None:
    inner = FsspecStore("memory://single-writer")
    store = SingleWriterStore(inner)
    assert not inner.capabilities.atomic_create
    assert store.capabilities.atomic_create
    assert store.capabilities.durable == inner.capabilities.durable


def test_place_to_commit_needs_the_promise() -> None:
    inner = FsspecStore("memory://single-writer-run")
    for refused in (Repository(inner).claim, lambda: Repository(inner).begin(1, 1)):
        with pytest.raises(UsageError, match=r"single_writer=True"):
            refused()
    single = Repository(SingleWriterStore(inner))
    assert single.begin(1, single.claim()).step == 1


def test_wrapper_sweeps_what_is_inside(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123456789abcdef").touch()
    assert SingleWriterStore(LocalStore(tmp_path)).sweep() == 1
    assert SingleWriterStore(MemoryStore("single-writer-memory")).sweep() == 0
