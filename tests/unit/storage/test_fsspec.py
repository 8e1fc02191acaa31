"""Any file system of fsspec as a store: what it promises, and what its errors become."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dist_ckpt.errors import CheckpointError, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.storage import FsspecStore, read_all
from dist_ckpt.testing import StoreContract


class TestMemory(StoreContract):
    """The memory of fsspec, as what all its file systems have in common."""

    @pytest.fixture
    def store(self, request: pytest.FixtureRequest) -> FsspecStore:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        return FsspecStore("memory://contract/run")

    @pytest.fixture
    def other(self, store: FsspecStore) -> FsspecStore:
        return FsspecStore(store.url + "/")


class _Breaking(MemoryFileSystem):  # type: ignore[misc]
    """Raises what a test wants when it is asked anything."""

    protocol = "breaking"
    cachable = False
    error: BaseException = OSError()

    def info(self, path: str, **_: Any) -> Any:
        raise self.error

    find = exists = isdir = isfile = info


class _Buffered(AbstractBufferedFile):  # type: ignore[misc]
    """A file that is sent in chunks and appears at the end, as those of object stores."""

    fail_at = 1

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.chunks += 1
        if self.fs.chunks == self.fail_at:
            raise OSError(errno.ENOSPC, "no space left")
        if final:
            self.fs.finished.append(self.path)
        return True

    def _initiate_upload(self) -> None:
        pass


class _Chunked(AbstractFileSystem):  # type: ignore[misc]
    protocol = "chunked"
    cachable = False
    finished: ClassVar[list[str]] = []  # of all that are made

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chunks = 0

    def info(self, path: str, **_: Any) -> Any:
        raise FileNotFoundError(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _Buffered:
        options.pop("block_size", None)
        return _Buffered(self, path, mode, block_size=5 << 20, **options)


fsspec.register_implementation("breaking", _Breaking, clobber=True)
fsspec.register_implementation("chunked", _Chunked, clobber=True)


def test_promises_no_more_than_it_keeps() -> None:
    capabilities = FsspecStore("memory://x").capabilities
    assert not capabilities.atomic_create
    assert not capabilities.durable
    assert not capabilities.direct_io


CALLS: dict[str, Callable[[FsspecStore], object]] = {
    "put": lambda store: store.put("k", [b"."]),
    "read": lambda store: store.read_into("k", 0, memoryview(bytearray(1))),
    "look": lambda store: store.size("k"),
    "list": lambda store: store.list_children(),
    "delete": lambda store: store.delete(["k"]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (PermissionError(errno.EACCES, "not yours"), StorageError, ErrorKind.PERMISSION),
        (OSError(errno.ENOSPC, "no space"), StorageError, ErrorKind.STORAGE_FULL),
        (TimeoutError("late"), StorageError, ErrorKind.TIMEOUT),
        (RuntimeError("a library of its own"), StorageError, ErrorKind.STORAGE),
        (TypeError("unexpected argument"), UsageError, ErrorKind.USAGE),
    ],
)
def test_every_error_is_mapped(
    call: str, error: Exception, expected: type[CheckpointError], kind: ErrorKind
) -> None:
    _Breaking.error = error
    with pytest.raises(expected, match="breaking://x") as caught:
        CALLS[call](FsspecStore("breaking://x"))
    assert type(caught.value) is expected
    assert caught.value.kind == kind
    assert caught.value.__cause__ is error


def test_interrupt_passes() -> None:
    _Breaking.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        FsspecStore("breaking://x").size("k")


def test_missing_object_is_not_found_and_no_outage_looks_like_it() -> None:
    _Breaking.error = FileNotFoundError("k")
    store = FsspecStore("breaking://x")
    with pytest.raises(NotFound, match="no object k in breaking://x"):
        store.size("k")
    assert list(store.list_entries()) == []
    store.delete(["k"])
    with pytest.raises(StorageError, match="does the place exist"):
        store.put("k", [b"."])


def test_failed_write_is_never_finished_later() -> None:
    """A file left half written is not completed when garbage is collected."""
    store = FsspecStore("chunked://x")
    with pytest.raises(StorageError) as caught:
        store.put("k", [bytes(6 << 20), bytes(6 << 20)])
    assert caught.value.kind == ErrorKind.STORAGE_FULL
    assert _Chunked.finished == []


def test_size_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FsspecStore("memory://compared")
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda fs, path, value: fs.store.update({path: None})
    )
    monkeypatch.setattr(MemoryFileSystem, "info", lambda fs, path, **_: {"size": 3, "type": "file"})
    monkeypatch.setattr(MemoryFileSystem, "exists", lambda fs, path: False)
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda fs, path: False)
    with pytest.raises(StorageError, match="3 of 5 bytes"):
        store.put("k", [b"12345"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The file systems that stores ask fsspec for, in their order."""
    found: list[Any] = []
    original = fsspec.filesystem

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(fsspec, "filesystem", noted)
    return found


def test_one_file_system_for_each_process(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    store = FsspecStore("memory://processes")
    for _ in range(2):
        store.put("k", [b"."], mode="replace")
    assert len(made) == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for _ in range(2):
        assert read_all(store, "k") == b"."
    first, second = made
    assert second is not first


def test_travels_to_another_process(made: list[Any]) -> None:
    store = FsspecStore("memory://travels", storage_options={"anything": 1})
    store.put("k", [b"."], mode="replace")
    there = copy.deepcopy(store)  # by way of what a pickle would hold
    assert len(made) == 1
    assert read_all(there, "k") == b"."
    assert len(made) == 2, "it has a file system of its own"
    store.close()
    assert store.size("k") == 1
    assert len(made) == 3, "the one before was let go"


def test_unknown_scheme() -> None:
    with pytest.raises(UsageError, match="foo"):
        FsspecStore("foo://x")


@pytest.mark.parametrize(("before", "after"), [(3, 7), (7, 3)])
def test_an_object_that_is_replaced_after_a_look_at_its_size_is_read_whole(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FsspecStore("memory://replaced")
    store.put("k", [b"o" * before], mode="replace")
    look = FsspecStore.size

    def replaced(self: FsspecStore, key: str) -> int:
        size = look(self, key)
        store.put("k", [b"n" * after], mode="replace")
        return size

    monkeypatch.setattr(FsspecStore, "size", replaced)
    target = bytearray(10)
    assert store.read_into("k", 0, memoryview(target)) == after
    assert target[:after] == b"n" * after
