"""What a network file system adds to a directory as a store: real quotas, and large files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.storage import LocalStore
from dist_ckpt.storage.disk import aligned_buffer

MIB = 1 << 20


def test_full_quota_leaves_nothing_behind(shared_folder: Callable[[int], Path]) -> None:
    here, there = shared_folder(0), shared_folder(1)
    here.mkdir()
    os.setxattr(here, "ceph.quota.max_bytes", str(8 * MIB).encode())
    store = LocalStore(here / "run")
    store.put("small", [b"."])
    with pytest.raises(StorageError, match=f"{64 * MIB} bytes were needed.*quota") as caught:
        store.put("large", [aligned_buffer(64 * MIB)])
    assert caught.value.kind == ErrorKind.STORAGE_FULL
    assert [entry.key for entry in LocalStore(there / "run").list_entries()] == ["small"]
    assert [path.name for path in (there / "run").iterdir()] == ["small"]


@pytest.mark.parametrize("tail", [0, 77])
def test_large_file_is_read_by_another_host(
    shared_folder: Callable[[int], Path], tail: int
) -> None:
    data = aligned_buffer(20 * MIB + tail)
    data[:] = os.urandom(MIB) * 20 + os.urandom(tail)
    LocalStore(shared_folder(0)).put("step/key", [data])
    found = aligned_buffer(data.nbytes + 4096)
    assert LocalStore(shared_folder(1)).read_into("step/key", 0, found) == data.nbytes
    assert found[: data.nbytes] == data


def test_what_another_host_replaced_is_seen(shared_folder: Callable[[int], Path]) -> None:
    here, there = LocalStore(shared_folder(0)), LocalStore(shared_folder(1))
    for nbytes in (3 * MIB, 1, 5 * MIB):
        data = aligned_buffer(nbytes)
        data[:] = os.urandom(nbytes)
        here.put("step/key", [data], mode="replace")
        found = aligned_buffer(8 * MIB)
        assert there.size("step/key") == nbytes
        assert there.read_into("step/key", 0, found) == nbytes
        assert found[:nbytes] == data
