"""Transfers past the page cache: exact bytes whatever is aligned, refused, short or shrinking."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.storage import LocalStore, disk
from dist_ckpt.storage.disk import aligned_buffer

SECTOR = 4096
PIECE = 4 * SECTOR


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Let files of a few sectors be what files of many megabytes are."""
    patch.setattr(disk, "DIRECT_BYTES", 2 * SECTOR)
    patch.setattr(disk, "PIECE_BYTES", PIECE)
    patch.setattr(disk, "READ_BYTES", PIECE)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def memory(data: bytes, *, shift: int = 0) -> memoryview:
    """Return `data` in memory that begins `shift` bytes after the begin of a page."""
    view = aligned_buffer(len(data) + shift)[shift:]
    view[:] = data
    return view


def read(store: LocalStore, nbytes: int, *, offset: int = 0, shift: int = 0) -> bytes:
    view = memory(bytes(nbytes), shift=shift)
    return bytes(view[: store.read_into("key", offset, view)])


class Flags:
    """Whether each transfer by the named call went past the page cache, by its offset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.direct: dict[int, bool] = {}
        real = getattr(os, name)

        def call(fd: int, data: object, offset: int) -> int:
            self.direct[offset] = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            return int(real(fd, data, offset))

        monkeypatch.setattr(os, name, call)


def skip_unless_taken(store: LocalStore) -> None:
    if not store.capabilities.direct_io:
        pytest.skip("the file system of the temporary folder takes no direct transfers")


@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 3 * PIECE), st.just(PIECE), st.just(SECTOR)), max_size=5
    ),
    shift=st.sampled_from([0, 0, 1, 512]),
    offset=st.one_of(st.integers(0, 4 * PIECE), st.sampled_from([0, SECTOR, PIECE])),
    wanted=st.integers(0, 5 * PIECE),
    read_shift=st.sampled_from([0, 0, 7]),
)
@settings(max_examples=60, deadline=None)
def test_any_buffers_come_back_from_any_range(
    sizes: Sequence[int], shift: int, offset: int, wanted: int, read_shift: int
) -> None:
    pieces = [os.urandom(size) for size in sizes]
    whole = b"".join(pieces)
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        store = LocalStore(root)
        store.put("key", [memory(piece, shift=shift) for piece in pieces])
        assert store.size("key") == len(whole)
        found = read(store, wanted, offset=offset, shift=read_shift)
        assert found == whole[offset : offset + wanted]


@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("tail", [0, 5])
def test_sectors_go_directly_and_the_tail_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int, tail: int
) -> None:
    store = LocalStore(tmp_path)
    written, found = Flags(monkeypatch, "pwrite"), Flags(monkeypatch, "preadv")
    data = os.urandom(3 * PIECE + SECTOR + tail)
    store.put("key", [memory(data, shift=shift)])
    assert read(store, len(data)) == data
    skip_unless_taken(store)
    assert {offset for offset, taken in written.direct.items() if taken} == {
        0, PIECE, 2 * PIECE, 3 * PIECE
    }  # fmt: skip
    assert [offset for offset, taken in written.direct.items() if not taken] == (
        [len(data) - tail] if tail else []
    )
    assert all(found.direct.values())


def test_small_and_unaligned_transfers_are_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    written, found = Flags(monkeypatch, "pwrite"), Flags(monkeypatch, "preadv")
    data = os.urandom(2 * SECTOR - 1)
    store.put("key", [memory(data)])
    assert read(store, len(data)) == data
    big = os.urandom(3 * PIECE)
    store.put("key", [memory(big)], mode="replace")
    written.direct.clear()
    assert read(store, len(big) - 1, offset=1) == big[1:]
    assert read(store, len(big), shift=1) == big
    assert written.direct == {}
    assert not any(found.direct.values())


class TestRefused:
    def test_at_the_flag_is_tried_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tries: list[int] = []
        real = fcntl.fcntl

        def set_flag(fd: int, command: int, flags: int = 0) -> int:
            if command == fcntl.F_SETFL and flags & os.O_DIRECT:
                tries.append(fd)
                raise OSError(errno.EINVAL, "no such thing here")
            return real(fd, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", set_flag)
        store = LocalStore(tmp_path)
        assert store.capabilities.direct_io
        data = os.urandom(3 * PIECE + 9)
        for _ in range(2):
            store.put("key", [memory(data)], mode="replace")
            assert read(store, len(data)) == data
        assert len(tries) == 1
        assert not store.capabilities.direct_io

    @pytest.mark.parametrize("refused_at", [0, 2 * PIECE])
    def test_at_the_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: int
    ) -> None:
        tries = refuse(monkeypatch, "pwrite", lambda offset: offset >= refused_at)
        store = LocalStore(tmp_path)
        data = os.urandom(4 * PIECE + 9)
        for _ in range(2):
            store.put("key", [memory(data)], mode="replace")
            assert (tmp_path / "key").read_bytes() == data
        # Both writers of the one put may have met it.
        assert 1 <= len(tries) <= 2
        assert not store.capabilities.direct_io

    def test_at_the_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = os.urandom(4 * PIECE + 9)
        (tmp_path / "key").write_bytes(data)
        tries = refuse(monkeypatch, "preadv", lambda offset: offset >= PIECE)
        store = LocalStore(tmp_path)
        for _ in range(2):
            assert read(store, len(data)) == data
        assert 1 <= len(tries) <= 8
        assert not store.capabilities.direct_io

    def test_on_a_system_without_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk, "O_DIRECT", 0)
        store = LocalStore(tmp_path)
        data = os.urandom(4 * PIECE + 9)
        store.put("key", [memory(data)])
        assert read(store, len(data)) == data


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, where: Callable[[int], bool]) -> list[int]:
    """Let the named call refuse what goes past the page cache; return the places of the refused."""
    refused: list[int] = []
    real = getattr(os, name)

    def call(fd: int, data: object, offset: int) -> int:
        if where(offset) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "not aligned to my taste")
        return int(real(fd, data, offset))

    monkeypatch.setattr(os, name, call)
    return refused


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_failing_piece_fails_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(tmp_path)
    data = os.urandom(8 * PIECE)
    store.put("key", [memory(data)])
    skip_unless_taken(store)
    real = getattr(os, call)

    def fail(fd: int, data: object, offset: int) -> int:
        if offset == 5 * PIECE:
            raise OSError(errno.EIO, "a bad sector")
        return int(real(fd, data, offset))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="a bad sector"):
        if call == "pwrite":
            store.put("other", [memory(data)])
        else:
            read(store, len(data))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert store.capabilities.direct_io


@pytest.mark.parametrize("step", [SECTOR, SECTOR + 100, 100])
def test_short_transfers_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write, fill = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:step], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: fill(fd, [views[0][:step]], at))
    store = LocalStore(tmp_path)
    data = os.urandom(3 * PIECE + 9)
    store.put("key", [memory(data)])
    assert (tmp_path / "key").read_bytes() == data
    if step > SECTOR:
        # What the disk cannot do is not what is tested here: sectors cut by a signal.
        whole = fill
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: min(whole(fd, views, at), step))
    assert read(store, len(data)) == data


def test_writes_that_take_nothing_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    store = LocalStore(tmp_path)
    with pytest.raises(StorageError, match="took no byte"):
        store.put("key", [memory(bytes(PIECE + 1))])
        skip_unless_taken(store)
        store.put("other", [memory(bytes(PIECE))])
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("left", [0, 5, PIECE, 2 * PIECE + 77])
def test_file_that_shrinks_is_read_up_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, shift: int
) -> None:
    store = LocalStore(tmp_path)
    data = os.urandom(8 * PIECE + 9)
    store.put("key", [memory(data)])
    real = os.preadv

    def shrink(fd: int, views: Sequence[memoryview], at: int) -> int:
        # Pieces further on may have been read before.
        if at == 2 * PIECE:
            os.truncate(tmp_path / "key", left)
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", shrink)
    found = read(store, len(data), shift=shift)
    assert found == data[: len(found)]
    assert min(left, 2 * PIECE) <= len(found) <= max(left, 2 * PIECE)


class TestPreallocation:
    def test_full_disk_shows_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers(monkeypatch, [errno.ENOSPC])
        written = Flags(monkeypatch, "pwrite")
        with pytest.raises(StorageError, match=f"{3 * PIECE} bytes were needed") as caught:
            LocalStore(tmp_path).put("key", [memory(bytes(3 * PIECE))])
        assert caught.value.kind == ErrorKind.STORAGE_FULL
        assert written.direct == {}
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("codes", [[errno.EOPNOTSUPP], [errno.ENOSYS], [errno.EINTR, 0]])
    def test_that_cannot_be_had_is_done_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int]
    ) -> None:
        left = answers(monkeypatch, codes)
        LocalStore(tmp_path).put("key", [memory(b"1" * 3 * PIECE)])
        assert (tmp_path / "key").read_bytes() == b"1" * 3 * PIECE
        assert left == []

    def test_is_not_known_to_every_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "fallocate", None)
        LocalStore(tmp_path).put("key", [memory(b"1" * 3 * PIECE)])
        assert (tmp_path / "key").read_bytes() == b"1" * 3 * PIECE


def answers(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[int]:
    """Let preallocation give these answers, 0 for success; return those not given yet."""
    left = list(codes)

    def fallocate(fd: int, mode: int, offset: int, nbytes: int) -> int:
        code = left.pop(0)
        ctypes.set_errno(code)
        return -1 if code else 0

    monkeypatch.setattr(disk, "fallocate", fallocate)
    return left


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (2 << 20) + 1])
def test_aligned_memory_is_on_a_page_and_empty(nbytes: int) -> None:
    view = aligned_buffer(nbytes)
    assert view.nbytes == nbytes
    assert not view.readonly
    assert bytes(view) == bytes(nbytes)
    if nbytes:
        assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % 4096 == 0


def test_aligned_memory_needs_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert aligned_buffer(4 << 20).nbytes == 4 << 20


def test_each_mount_is_tried_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    here = os.stat(tmp_path).st_dev

    class Status:
        def __init__(self, fd: int) -> None:
            self._status = real(fd)
            # Which of the two folders it is in tells the "mount".
            self.st_dev = here + (b"two" in os.fsencode(os.readlink(f"/proc/self/fd/{fd}")))

        def __getattr__(self, name: str) -> object:
            return getattr(self._status, name)

    monkeypatch.setattr(os, "fstat", Status)
    tries = refuse(monkeypatch, "pwrite", lambda _: True)
    store = LocalStore(tmp_path)
    for key in ("one/a", "one/b", "two/a", "two/b"):
        before = len(tries)
        store.put(key, [memory(bytes(PIECE))])
        assert len(tries) == before + (key[-1] == "a"), key
