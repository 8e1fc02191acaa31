"""A local disk: what its raw limit is, and what of it a store and stock DCP reach."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.measure import Case, interleave, no_warnings, table, verdict
from dist_ckpt.format.files import block_digests
from dist_ckpt.storage import LocalStore
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import in_parallel

WRITE_TARGET = 1.25
READ_TARGET = 1.25

_PIECE_BYTES = 8 << 20
_SEGMENT_BYTES = 32 << 20
_TENSOR_BYTES = 64 << 20
_LIMIT = "raw limit"
_STORE = "LocalStore"
_SEGMENTS = "LocalStore, by segments, verified"


def run(place: Path, data: memoryview, *, repeats: int) -> bool:
    """Measure writes and cold reads of `data` below `place`; return whether the targets are met.

    Args:
        place: a folder on the disk; it is created, and what this writes is removed again.
        data: bytes in aligned memory, a multiple of 64 MiB.
        repeats: how many runs the medians are of.
    """
    bench = _Bench(place, data)
    try:
        writes = table(
            "Durable write to a local disk",
            interleave(bench.writes(), repeats=repeats),
            nbytes=data.nbytes,
            limits=[_LIMIT],
        )
        met = verdict("LocalStore.put against the raw limit", writes[_STORE], target=WRITE_TARGET)
        bench.prepare_reads()
        reads = table(
            "Cold read from a local disk",
            interleave(bench.reads(), repeats=repeats),
            nbytes=data.nbytes,
            limits=[_LIMIT],
        )
        return met & verdict(
            "LocalStore.read_into against the raw limit", reads[_STORE], target=READ_TARGET
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_raw(path: str, data: memoryview) -> None:
    """Write `data`, aligned and of whole sectors, to a new file as fast as the disk takes it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    os.posix_fallocate(fd, 0, data.nbytes)

    def write(offset: int) -> None:
        piece = data[offset : offset + _PIECE_BYTES]
        if os.pwrite(fd, piece, offset) != piece.nbytes:
            raise AssertionError("a short write")

    in_parallel(write, range(0, data.nbytes, _PIECE_BYTES), threads=2)
    os.fsync(fd)
    os.close(fd)


def read_raw(path: str, target: memoryview) -> None:
    """Fill `target`, aligned and of whole sectors, from a file as fast as the disk gives it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> None:
        piece = target[offset : offset + _PIECE_BYTES]
        if os.preadv(fd, [piece], offset) != piece.nbytes:
            raise AssertionError("a short read")

    in_parallel(read, range(0, target.nbytes, _PIECE_BYTES), threads=8)
    os.close(fd)


def drop_cache(place: Path) -> None:
    """Leave nothing of the files below `place` in the page cache."""
    for path in place.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class _Bench:
    def __init__(self, place: Path, data: memoryview) -> None:
        self._place = place
        self._data = data
        self._raw = str(place / "raw")
        self._store = LocalStore(place / "store")
        self._stock = place / "stock"
        self._target = aligned_buffer(data.nbytes)
        self._target[:] = data  # no read pays for the first touch of its memory
        self._state = _tensors(data)
        self._loaded = _tensors(self._target)

    def writes(self) -> list[Case]:
        """Return the ways to write the same bytes, each to an empty place."""
        return [
            Case(_LIMIT, self._write_raw, before=self._clear),
            Case(_STORE, self._put, before=self._clear),
            Case("stock dcp.save", self._save_stock, before=self._clear),
        ]

    def prepare_reads(self) -> None:
        self._clear()
        self._write_raw()
        self._put()
        self._save_stock()

    def reads(self) -> list[Case]:
        """Return the ways to read the same bytes, none of which are in the page cache."""

        def case(name: str, read: Callable[[], object], after: Callable[[], object]) -> Case:
            return Case(name, read, before=self._make_cold, after=after)

        return [
            case(_LIMIT, self._read_raw, self._check),
            case(_STORE, self._read_whole, self._check),
            case(_SEGMENTS, self._read_segments, self._make_cold),
            case("stock dcp.load", self._load_stock, self._check),
        ]

    def _clear(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        _flush(self._place)

    def _make_cold(self) -> None:
        np.frombuffer(self._target, dtype=np.uint8).fill(0)
        drop_cache(self._place)

    def _check(self) -> None:
        if self._target != self._data:
            raise AssertionError("what was read is not what was written")

    def _write_raw(self) -> None:
        write_raw(self._raw, self._data)

    def _read_raw(self) -> None:
        read_raw(self._raw, self._target)

    def _put(self) -> None:
        self._store.put("step/save/model", [self._data])

    def _read_whole(self) -> None:
        self._store.read_into("step/save/model", 0, self._target)

    def _read_segments(self) -> None:
        """Read as a load does: one segment after another into new memory, each one verified."""
        for offset in range(0, self._data.nbytes, _SEGMENT_BYTES):
            segment = aligned_buffer(min(_SEGMENT_BYTES, self._data.nbytes - offset))
            self._store.read_into("step/save/model", offset, segment)
            block_digests(segment)

    def _save_stock(self) -> None:
        with no_warnings():
            dcp_save(self._state, checkpoint_id=self._stock, no_dist=True)

    def _load_stock(self) -> None:
        with no_warnings():
            dcp_load(self._loaded, checkpoint_id=self._stock, no_dist=True)


def _tensors(data: memoryview) -> dict[str, torch.Tensor]:
    """Return `data` as the tensors of a state, without a copy."""
    flat = torch.frombuffer(data, dtype=torch.uint8)
    starts = range(0, data.nbytes, _TENSOR_BYTES)
    return {f"layer.{n}": flat[start : start + _TENSOR_BYTES] for n, start in enumerate(starts)}


def _flush(folder: Path) -> None:
    """Let the disk come to rest: what was removed is removed before anything is timed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
