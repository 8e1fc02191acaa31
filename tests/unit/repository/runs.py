"""Runs made by hand: checkpoints of a few bytes, committed without ranks, threads or torch."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from dist_ckpt.format.files import (
    FileEntry,
    ShardEntry,
    block_digests,
    bytes_digest,
    file_digest,
    layout,
)
from dist_ckpt.format.index import Box, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.manifest import FilesTotal, Manifest
from dist_ckpt.format.names import shard_name
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.repository import Repository, Transaction
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.memory import MemoryStore

MODEL = shard_name("model", 0)
EXTRA = shard_name("extra", 0)
DOCUMENT = b'{"epoch": 3}'

_names = itertools.count()


def new_store() -> MemoryStore:
    """Return a place in memory that no other test has seen."""
    return MemoryStore(f"unit-repository-{next(_names)}")


def shard(content: bytes, *, name: str = "w") -> bytes:
    """Return a shard file that holds `content` as one uint8 tensor."""
    planned = layout([ShardEntry(name, "uint8", (len(content),))], {})
    return planned.header + content


def put_files(attempt: Transaction, content: bytes) -> Index:
    """Put a model and an extra file of an attempt; return the index of both."""
    files = {MODEL: shard(content), EXTRA: shard(DOCUMENT, name="notes")}
    for name, data in files.items():
        attempt.put_file(name, [data[:10], data[10:]])
    entries = [
        FileEntry(name, len(data), file_digest(block_digests(data)), block_digests(data))
        for name, data in files.items()
    ]
    offset = len(files[EXTRA]) - len(DOCUMENT)
    return Index.build(
        entries,
        [TensorEntry("model", "w", "uint8", (len(content),))],
        [ObjectEntry("notes", None, 1, offset, len(DOCUMENT), bytes_digest(DOCUMENT))],
        [(0, 0, len(files[MODEL]) - len(content), Box((0,), (len(content),)))],
    )


def manifest_of(attempt: Transaction, index: Index, **said: Any) -> Manifest:
    """Describe the attempt; `said` are fields of the manifest that are to be otherwise."""
    plain = Manifest(
        step=attempt.step,
        save_id=attempt.save_id,
        claim=attempt.claim,
        created="2026-01-02T03:04:05+00:00",
        world_size=1,
        versions={},
        parts=["model", "notes"],
        files=FilesTotal.of(file.nbytes for file in index.files),
        metrics={},
        metadata={},
        timings={},
        parent_step=None,
    )
    return msgspec.structs.replace(plain, **said)


def commit(attempt: Transaction, content: bytes = b"weights", **said: Any) -> Manifest:
    """Write all files of an attempt and commit it; `said` as for `manifest_of`."""
    index = put_files(attempt, content)
    return attempt.commit(encode_whole(index), manifest_of(attempt, index, **said))


def save(store: Store, *steps: int, claim: int | None = None, content: bytes = b"weights") -> int:
    """Commit `steps` under one claim, a new one by default; return the claim."""
    repository = Repository(store)
    number = repository.claim() if claim is None else claim
    for step in steps:
        commit(repository.begin(step, number), content)
    return number


def keys(store: Store) -> list[str]:
    """List every key."""
    return [entry.key for entry in store.list_entries()]
