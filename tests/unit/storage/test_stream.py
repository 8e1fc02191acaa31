"""Objects that are stored while they are made, by every store that there is without a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_ckpt.errors import AlreadyExists, IntegrityError, StorageError
from dist_ckpt.storage import disk
from dist_ckpt.storage.base import PutMode, Store, Stream, put_stream, read_all
from dist_ckpt.storage.fsspec import FsspecStore
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.storage.readonly import ReadOnlyStore
from dist_ckpt.storage.retry import RetryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

# Larger than what any of them takes at once.
PIECES = [bytes([number]) * size for number, size in enumerate((3, 9 << 20, 1, 8 << 20, 7))]
WHOLE = b"".join(PIECES)

STORES: dict[str, Callable[[Path], Store]] = {
    "local": LocalStore,
    "memory": lambda folder: MemoryStore(f"stream-{folder.name}"),
    "fsspec": lambda folder: FsspecStore(f"local://{folder}"),
}


def stream(log: list[int] | None = None) -> Stream:
    def pieces() -> Iterator[memoryview]:
        for number, piece in enumerate(PIECES):
            if log is not None:
                log.append(number)
            yield memoryview(piece)

    return Stream(len(WHOLE), pieces)


@pytest.mark.parametrize("kind", STORES)
def test_what_is_made_is_stored(kind: str, tmp_path: Path) -> None:
    store = STORES[kind](tmp_path)
    put_stream(store, "a/b", stream())
    assert read_all(store, "a/b") == WHOLE
    with pytest.raises(AlreadyExists):
        put_stream(store, "a/b", stream())
    put_stream(store, "a/b", Stream.of([memoryview(b"new")]), mode="replace")
    assert read_all(store, "a/b") == b"new"


@pytest.mark.parametrize("kind", STORES)
def test_what_cannot_be_made_leaves_nothing(kind: str, tmp_path: Path) -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(PIECES[1])
        raise IntegrityError("the source is damaged")

    store = STORES[kind](tmp_path)
    with pytest.raises(IntegrityError, match="the source is damaged"):
        put_stream(store, "a", Stream(len(WHOLE), pieces))
    assert list(store.list_entries()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_refuses_direct_writes_gets_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(22, "not here")

    monkeypatch.setattr(disk, "write_at", refused)
    log: list[int] = []
    put_stream(LocalStore(tmp_path), "a", stream(log))
    assert (tmp_path / "a").read_bytes() == WHOLE
    assert log[-len(PIECES) :] == list(range(len(PIECES))), "made anew from the first piece on"


def compared(told: list[tuple[int, int]]) -> Stream:
    return Stream(len(WHOLE), stream().pieces, compared=lambda *where: told.append(where))


def test_what_a_disk_wrote_is_compared_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[list[tuple[int, int]]] = []
    link = os.link
    told: list[tuple[int, int]] = []

    def watch(*names: str) -> None:
        named.append(sorted(told))
        link(*names)

    monkeypatch.setattr(os, "link", watch)
    store = LocalStore(tmp_path)
    put_stream(store, "a", compared(told))
    assert read_all(store, "a") == WHOLE
    if not store.capabilities.direct_io:
        pytest.skip(f"{tmp_path} takes no direct transfers")
    reached = 0
    for start, nbytes in named[0]:
        assert start == reached
        reached += nbytes
    assert 0 <= len(WHOLE) - reached < 4096, "all but the last part of a sector"


@pytest.mark.parametrize("mode", ["create", "replace"])
def test_what_a_disk_gives_back_otherwise_is_not_stored(
    mode: PutMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("a" if mode == "replace" else "b", [b"before"])
    read = os.preadv

    def flip(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = read(fd, buffers, offset)
        if offset == 8 << 20:
            buffers[0][count - 1] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flip)
    if not store.capabilities.direct_io:
        pytest.skip(f"{tmp_path} takes no direct transfers")
    with pytest.raises(IntegrityError, match="reads otherwise between the bytes 8388608 and"):
        put_stream(store, "a", compared([]), mode=mode)
    monkeypatch.undo()
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"before"]


def test_what_nobody_asks_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> int:
        raise AssertionError

    monkeypatch.setattr(os, "preadv", never)
    put_stream(LocalStore(tmp_path), "a", stream())


def test_wrappers_hand_it_on_and_count_it(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    meter = MeterStore(LimitStore(inner, max_concurrent=1))
    put_stream(meter, "a", stream())
    assert read_all(inner, "a") == WHOLE
    assert meter.usage().operations["put"].nbytes == len(WHOLE)
    with pytest.raises(StorageError, match="read-only"):
        put_stream(ReadOnlyStore(inner), "b", stream())
    waits: list[float] = []
    slow = LimitStore(inner, max_bytes_per_second=1e6, clock=lambda: 0.0, sleep=waits.append)
    for key in ("c", "d"):
        put_stream(slow, key, stream())
    assert waits == [len(WHOLE) / 1e6]


def test_a_put_whose_answer_was_lost_is_known_again(tmp_path: Path) -> None:
    lost = Rule("put", Fail(StorageError("the answer was lost"), after=True))
    store = RetryStore(FaultyStore(LocalStore(tmp_path), [lost]), sleep=lambda _: None)
    put_stream(store, "a", stream())
    assert store.retries == 1
    assert read_all(store, "a") == WHOLE


def test_a_key_of_somebody_else_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("a", [WHOLE[:-1] + b"?"])
    rules = [Rule("put", Fail(StorageError("try again")))]
    store = RetryStore(FaultyStore(LocalStore(tmp_path), rules), sleep=lambda _: None)
    with pytest.raises(AlreadyExists):
        put_stream(store, "a", stream())


def test_a_store_that_takes_no_streams_gets_all_of_it() -> None:
    class Plain:
        def put(self, key: str, buffers: list[memoryview], *, mode: str) -> None:
            self.got = key, b"".join(buffers), mode

    plain = Plain()
    put_stream(plain, "a", stream(), mode="replace")  # type: ignore[arg-type]
    assert plain.got == ("a", WHOLE, "replace")
