"""Planning what to read of a checkpoint that a thousand ranks wrote: no byte of data is touched."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from dist_ckpt.format import whole as whole_format
from dist_ckpt.format.files import BLOCK_BYTES, DIGEST_BYTES, FileEntry, block_count, file_digest
from dist_ckpt.format.index import ChunkTable, Held, Index, TensorEntry
from dist_ckpt.format.names import shard_name
from dist_ckpt.loading.filling import Files, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox

TENSORS = 1500
CHUNKS = 1024
READERS = 768

_ROWS, _COLUMNS = 3, 16  # of one chunk: no rank's share of the rows ends where a chunk does
_GAP_BYTES = 1 << 20


def index_bytes(tensors: int = TENSORS, chunks: int = CHUNKS) -> bytes:
    """Return the index of `tensors` tensors, each cut by rows into `chunks`, a file for each."""
    chunk_bytes = 4 * _ROWS * _COLUMNS
    blocks = bytes(DIGEST_BYTES * block_count(tensors * chunk_bytes))
    files = tuple(
        FileEntry(shard_name("model", rank), tensors * chunk_bytes, file_digest(blocks), blocks)
        for rank in range(chunks)
    )
    entries = tuple(
        TensorEntry("model", f"layers.{n}.weight", "float32", (chunks * _ROWS, _COLUMNS))
        for n in range(tensors)
    )
    boxes = np.zeros((tensors, chunks, 2, 2), np.int64)
    boxes[:, :, 0, 0] = np.arange(chunks) * _ROWS
    boxes[:, :, 1] = _ROWS, _COLUMNS
    table = ChunkTable(
        np.repeat(np.arange(tensors, dtype=np.uint32), chunks),
        np.tile(np.arange(chunks, dtype=np.uint32), tensors),
        np.repeat(np.arange(tensors, dtype=np.uint64) * np.uint64(chunk_bytes), chunks),
        boxes.reshape(-1),
    )
    return whole_format.encode(Index(files, entries, (), table))


def shares(data: bytes) -> dict[str, Callable[[], float]]:
    """Return what plans the load of one rank and tells the seconds, by what that rank wants.

    Args:
        data: the bytes of the index.
    """
    entries = whole_format.decode(data).tensors
    rows = entries[0].shape[0]
    size = -(-rows // READERS)
    middle = READERS // 2 * size if READERS // 2 * size < rows else 0
    return {
        f"one of {READERS} ranks": _planner(data, entries, middle, min(size, rows)),
        "one rank alone": _planner(data, entries, 0, rows),
    }


def _planner(
    data: bytes, entries: tuple[TensorEntry, ...], first: int, rows: int
) -> Callable[[], float]:
    memory = torch.empty(rows, _COLUMNS)  # nothing is written to it
    wanted = [
        Wanted(
            number,
            LocalBox(
                Held(each.part, each.name, each.dtype, each.shape, (first, 0), (rows, _COLUMNS)),
                memory,
            ),
            torch.float32,
        )
        for number, each in enumerate(entries)
    ]

    def run() -> float:
        begun = time.perf_counter()
        index = whole_format.decode(data)
        sizes = [file.nbytes for file in index.files]
        files = Files(sizes, unit_bytes=BLOCK_BYTES, apart_bytes=_GAP_BYTES)
        ReadTargets(index, wanted, files, max_gap_bytes=_GAP_BYTES)
        return time.perf_counter() - begun

    return run
