"""Verified reads of a file on a disk: straight from it, and never of bytes that were not saved."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.files import BLOCK_BYTES
from dist_ckpt.repository import Checkpoint, Repository
from dist_ckpt.storage import LocalStore

ELEMENTS = (12 << 20) // 4  # enough for several pieces that are read in parallel


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    """A checkpoint whose file 0 is larger than what is read at once."""
    weights = torch.arange(ELEMENTS, dtype=torch.int32)
    dist_ckpt.save({"model": {"weights": weights}}, str(tmp_path / "run"), step=1)
    return Repository(LocalStore(tmp_path / "run")).open(1)


def path_of(checkpoint: Checkpoint) -> Path:
    (name,) = (name for name, nbytes in checkpoint.files if nbytes > 4 * ELEMENTS - 1)
    return Path(checkpoint.store.url) / checkpoint.key(name)


def read(checkpoint: Checkpoint) -> memoryview:
    (number,) = (n for n, each in enumerate(checkpoint.files) if each[1] > 4 * ELEMENTS - 1)
    return checkpoint.read_blocks(number, 0, checkpoint.files[number][1])


def when_read_at(
    monkeypatch: pytest.MonkeyPatch, offset: int, do: Callable[[], object]
) -> list[bool]:
    """Call `do` as the piece of a shard from `offset` on is read; return which reads are direct."""
    real = os.preadv
    found: list[bool] = []

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        # What follows a commit, in the thread that saved, may read manifests meanwhile.
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            found.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
            if at == offset:
                do()
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def test_memory_is_such_that_the_disk_reads_into_it(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = when_read_at(monkeypatch, -1, lambda: None)
    data = read(saved)
    assert bytes(data) == path_of(saved).read_bytes()
    if saved.store.capabilities.direct_io:
        assert len(direct) > 1
        assert all(direct)


def test_file_that_shrinks_while_it_is_read_is_truncated(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 9 * BLOCK_BYTES + 77
    when_read_at(monkeypatch, 8 << 20, lambda: os.truncate(path_of(saved), left))
    with pytest.raises(IntegrityError, match="committed") as caught:
        read(saved)
    assert caught.value.kind == ErrorKind.TRUNCATED


def test_file_that_changes_while_it_is_read_is_damaged(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        with path_of(saved).open("r+b") as file:
            file.seek(9 * BLOCK_BYTES + 3)
            file.write(b"!")

    when_read_at(monkeypatch, 8 << 20, change)
    with pytest.raises(
        IntegrityError, match=r"\(bytes 9179136 to 9441280\) differs from its digest"
    ):
        read(saved)
