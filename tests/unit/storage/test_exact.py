"""Deleting an object only if it holds certain bytes, with others at work on the same key."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ckpt.errors import StorageError
from dist_ckpt.storage import FsspecStore, LocalStore, MemoryStore, ReadOnlyStore, Store, read_all
from dist_ckpt.storage.base import ExactDeleter, delete_exactly
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule

_names = itertools.count()
OLD, NEW = b"damaged", b"good"


def _memory(_: Path) -> Store:
    return MemoryStore(f"exact-{next(_names)}")


MAKERS: list[Callable[[Path], Store]] = [
    _memory,
    LocalStore,
    lambda path: CrashStore(LocalStore(path)),
    lambda _: FsspecStore(f"memory://exact-{next(_names)}"),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("other", [b"", b"damage", b"damaged!", b"Damaged", b"x" * 1000])
def test_only_exactly_these_bytes_go(
    tmp_path: Path, make: Callable[[Path], Store], other: bytes
) -> None:
    store = make(tmp_path)
    store.put("a/k", [other])
    assert not delete_exactly(store, "a/k", OLD)
    assert read_all(store, "a/k") == other
    assert delete_exactly(store, "a/k", other)
    assert store.list_children() == []
    for key in ("a/k", "a", "a/k/z"):
        assert not delete_exactly(store, key, OLD)


def test_it_is_a_deletion_like_any_other() -> None:
    inner = _memory(Path())
    inner.put("k", [OLD])
    counted = CrashStore(inner)
    failing = FaultyStore(counted, [Rule("delete", Fail(StorageError("down")), key="k")])
    with pytest.raises(StorageError, match="down"):
        delete_exactly(failing, "k", OLD)
    with pytest.raises(StorageError, match="read-only"):
        delete_exactly(ReadOnlyStore(inner), "k", OLD)
    assert delete_exactly(failing, "k", OLD)
    assert counted.operations == [("delete", "k")]


@pytest.mark.parametrize("links", [True, False])
def test_what_took_its_place_after_the_look_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    store = LocalStore(tmp_path, single_writer=True)
    store.put("a/k", [OLD])
    real = os.rename
    replaced: list[int] = []

    def rename(source: str, target: str) -> None:
        if not replaced:
            replaced.append(1)
            LocalStore(tmp_path).put("a/k", [NEW], mode="replace")
        real(source, target)

    def no_link(*_: Any) -> None:
        raise PermissionError(1, "no links")

    monkeypatch.setattr(os, "rename", rename)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    assert not store.delete_exactly("a/k", OLD)
    assert replaced
    assert read_all(store, "a/k") == NEW
    assert not list(tmp_path.rglob(".tmp-*"))


def test_nothing_behind_a_link_goes(tmp_path: Path) -> None:
    LocalStore(tmp_path / "theirs").put("k", [OLD])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").symlink_to(tmp_path / "theirs")
    with pytest.raises(StorageError, match="link"):
        LocalStore(tmp_path / "run").delete_exactly("a/k", OLD)
    assert (tmp_path / "theirs" / "k").read_bytes() == OLD


def test_every_store_that_can_says_so(tmp_path: Path) -> None:
    assert isinstance(LocalStore(tmp_path), ExactDeleter)
    assert isinstance(MemoryStore("exact"), ExactDeleter)
    assert not isinstance(FsspecStore("memory://exact"), ExactDeleter)
