"""How fast a place is, by the stores that checkpoints go through."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_ckpt.errors import IntegrityError

if TYPE_CHECKING:
    from dist_ckpt.storage import Store

_RANDOM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes per second, of all files together."""

    write: float
    read: float


def measure(
    store: Store,
    folder: str,
    *,
    nbytes: int,
    files: int,
    told: Callable[[int], None] = lambda _: None,
) -> Speed:
    """Write files below `folder`, all at once, and read them back.

    Args:
        store: the place.
        folder: below which of its folders.
        nbytes: of all files together.
        files: how many.
        told: called, on any thread, with bytes that go to the place, and with those that came back.

    Raises:
        IntegrityError: what was read is not what was written.
        StorageError: the backend failed.
    """
    disk: Any = import_module("dist_ckpt.storage.disk")
    parallel: Any = import_module("dist_ckpt.threads")
    data = disk.aligned_buffer(max(nbytes // files, 1))
    # Not zeros, which a file system may leave out, and no more of it than takes a moment to make.
    noise = os.urandom(_RANDOM_BYTES)
    for start in range(0, data.nbytes, _RANDOM_BYTES):
        piece = data[start : start + _RANDOM_BYTES]
        piece[:] = noise[: piece.nbytes]
    # All are read at once, so each has its own.
    buffers = [disk.aligned_buffer(data.nbytes) for _ in range(files)]
    keys = [f"{folder}{number}" for number in range(files)]

    def put(key: str) -> None:
        # The rounds of a bench use the same names again.
        store.put(key, [data], mode="replace", watch=told)

    def read(number: int) -> None:
        told(store.read_into(keys[number], 0, buffers[number]))

    began = time.perf_counter()
    parallel.in_parallel(put, keys, threads=files)
    written = time.perf_counter()
    parallel.in_parallel(read, range(files), threads=files)
    ended = time.perf_counter()
    # After the clock: a comparison would count as time of the place.
    if any(buffer != data for buffer in buffers):
        raise IntegrityError(f"{store.url} does not read what was written there")
    total = data.nbytes * files
    return Speed(total / (written - began), total / (ended - written))
