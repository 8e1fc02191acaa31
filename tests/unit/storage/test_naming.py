"""Mounts without hard links: refused with the way out, or used by the single writer promised."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt.errors import AlreadyExists, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import Entry, LocalStore, Store, disk, read_all, resolve
from dist_ckpt.storage.disk import aligned_buffer

# What file systems without links answer: FAT, SMB, FUSE, a limit of one link, a union of disks.
CODES = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL, 524]


class Linkless:
    """Lets every link fail; counts the attempts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.attempts = 0
        self._code = code
        monkeypatch.setattr(os, "link", self.link)

    def link(self, source: str, target: str) -> None:
        self.attempts += 1
        raise OSError(self._code, os.strerror(self._code), source)


@pytest.fixture(params=["renameat2", "rename"])
def linkless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Linkless:
    """No links, and with or without a rename that replaces nothing."""
    if request.param == "rename":
        monkeypatch.setattr(disk, "renameat2", None)
    return Linkless(monkeypatch, errno.EPERM)


@pytest.mark.parametrize("code", CODES)
def test_without_the_promise_it_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    Linkless(monkeypatch, code)
    store = LocalStore(tmp_path)
    assert store.capabilities.atomic_create, "nothing is written to find out"
    with pytest.raises(StorageError, match=r"no hard links.*single_writer=True"):
        store.put("key", [b"."])
    assert list(tmp_path.iterdir()) == []
    assert Repository(store).store.capabilities == replace(
        LocalStore(tmp_path).capabilities, atomic_create=False
    )
    with pytest.raises(UsageError, match="single_writer=True"):
        Repository(store).claim()


def test_a_run_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Linkless(monkeypatch, errno.EPERM)
    with (
        dist_ckpt.Checkpointer(str(tmp_path / "run"), {"n": {"step": 1}}) as ckpt,
        pytest.raises(StorageError, match="single_writer=True"),
    ):
        ckpt.restore()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_other_failures_are_not_taken_for_missing_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patch:
        Linkless(patch, code)
        store = LocalStore(tmp_path, single_writer=True)
        with pytest.raises(StorageError, match=os.strerror(code)):
            store.put("key", [b"."])
    store.put("key", [b"."])
    assert read_all(store, "key") == b"."


@pytest.mark.parametrize("code", CODES)
def test_with_the_promise_links_are_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    links = Linkless(monkeypatch, code)
    store = resolve(str(tmp_path), single_writer=True)
    assert store.capabilities.atomic_create
    for number in range(5):
        store.put(f"a/{number}", [bytes([number])])
    with pytest.raises(AlreadyExists):
        store.put("a/0", [b"other"])
    assert links.attempts == 1
    assert [read_all(store, f"a/{n}") for n in range(5)] == [bytes([n]) for n in range(5)]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_what_has_links_goes_on_to_use_them(tmp_path: Path) -> None:
    linked: list[int] = []
    store = LocalStore(tmp_path, single_writer=True)
    real = os.link

    def link(source: str, target: str) -> None:
        linked.append(1)
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", link)
        store.put("a", [b"."])
        store.put("b", [b"."])
    assert len(linked) == 2


def test_nothing_that_exists_is_replaced(tmp_path: Path, linkless: Linkless) -> None:
    store = LocalStore(tmp_path, single_writer=True)
    store.put("key", [b"first"])
    (tmp_path / "link").symlink_to("nowhere")
    for key in ("key", "link"):
        with pytest.raises(AlreadyExists, match=key):
            store.put(key, [b"second"])
    assert read_all(store, "key") == b"first"
    store.put("key", [b"third"], mode="replace")
    assert read_all(store, "key") == b"third"


def test_writers_of_one_host_have_one_winner(tmp_path: Path, linkless: Linkless) -> None:
    """More than was promised, so that a mistake on one host does no harm."""
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        store = LocalStore(tmp_path, single_writer=True)
        start.wait()
        try:
            store.put("race", [bytes([number])] * 1000)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert read_all(LocalStore(tmp_path), "race") == bytes([won.index(True)]) * 1000


def test_bytes_are_flushed_and_closed_before_they_have_a_name(
    tmp_path: Path, linkless: Linkless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent only when a file is closed may fail only then."""
    real_dup, real_close = os.dup, os.close
    copies: list[int] = []

    def dup(fd: int) -> int:
        copies.append(real_dup(fd))
        return copies[-1]

    def close(fd: int) -> None:
        real_close(fd)
        if fd in copies:
            raise OSError(errno.EIO, "the upload failed")

    monkeypatch.setattr(os, "dup", dup)
    monkeypatch.setattr(os, "close", close)
    store = LocalStore(tmp_path, single_writer=True)
    with pytest.raises(StorageError, match="the upload failed"):
        store.put("key", [b"."])
    assert copies
    assert list(store.list_entries()) == []
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("there", [True, False])
def test_rename_whose_answer_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    Linkless(monkeypatch, errno.EPERM)
    monkeypatch.setattr(disk, "renameat2", None)
    real = os.rename

    def rename(source: str, target: str) -> None:
        if there:
            real(source, target)
        raise FileNotFoundError(errno.ENOENT, "sent again by the client", source)

    monkeypatch.setattr(os, "rename", rename)
    store = LocalStore(tmp_path, single_writer=True)
    if there:
        store.put("key", [b"mine"])
        assert read_all(store, "key") == b"mine"
    else:
        with pytest.raises(StorageError):
            store.put("key", [b"mine"])
        assert list(store.list_entries()) == []


def _fail(code: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_a_mount_that_knows_almost_nothing_is_used(
    tmp_path: Path, linkless: Linkless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No links, no direct transfers, no preallocation, no flush of folders, no locks."""
    real_fcntl, real_fsync = fcntl.fcntl, os.fsync

    def control(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return int(real_fcntl(fd, command, argument))

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real_fsync(fd)

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", _fail(errno.ENOSYS))
    monkeypatch.setattr("dist_ckpt.storage.disk.fallocate", None)
    store: Store = LocalStore(tmp_path, single_writer=True)
    data = aligned_buffer(3 << 20)
    store.put("a/large", [data])
    store.put("a/small", [b"."])
    assert not store.capabilities.direct_io
    assert list(store.list_entries()) == [Entry("a/large", 3 << 20), Entry("a/small", 1)]
    assert read_all(store, "a/large") == data
    store.delete(["a/large", "a/small"])
    assert list(store.list_entries()) == []
