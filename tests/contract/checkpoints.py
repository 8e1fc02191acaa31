"""Checkpoints made of a store and bytes alone, without torch and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from dist_ckpt.format.files import FileEntry, ShardEntry, block_digests, file_digest, layout
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.format.manifest import FilesTotal, Manifest
from dist_ckpt.format.names import shard_name
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.repository import Repository, Transaction

PART = "model"


def put_shard(transaction: Transaction, rank: int, data: bytes) -> FileEntry:
    """Store one shard file that holds `data` as the tensor of that rank."""
    shape = layout([ShardEntry(f"weights{rank}", "uint8", (len(data),))], {})
    whole = shape.header + data
    name = shard_name(PART, rank)
    transaction.put_file(name, [shape.header, data])
    blocks = block_digests(whole)
    return FileEntry(name, len(whole), file_digest(blocks), blocks)


def index_of(files: Sequence[FileEntry], sizes: Sequence[int]) -> Index:
    """Return the index of files whose tensors have the given sizes in bytes."""
    tensors = [
        TensorEntry(PART, f"weights{rank}", "uint8", (size,)) for rank, size in enumerate(sizes)
    ]
    rows = (
        (rank, rank, files[rank].nbytes - size, Box((0,), (size,)))
        for rank, size in enumerate(sizes)
    )
    return Index.build(files, tensors, [], rows)


def commit(transaction: Transaction, index: Index) -> Manifest:
    """Commit `index`, whose files were all put."""
    return transaction.commit(
        encode_whole(index),
        Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(index.files),
            versions={"dist_ckpt": "unknown"},
            parts=[PART],
            files=FilesTotal.of(file.nbytes for file in index.files),
            metrics={},
            metadata={},
            timings={},
            parent_step=None,
        ),
    )


def save(repository: Repository, step: int, datas: Sequence[bytes], *, threads: int = 1) -> None:
    """Commit a checkpoint of one file for each of `datas`, under a new claim."""
    transaction = repository.begin(step, repository.claim())
    with ThreadPoolExecutor(threads) as pool:
        files = list(
            pool.map(lambda pair: put_shard(transaction, pair[0], pair[1]), enumerate(datas))
        )
    commit(transaction, index_of(files, [len(data) for data in datas]))
