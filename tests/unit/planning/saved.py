"""Checkpoints in memory, made of what the dcp room plans and stages, with no engine around it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from dist_ckpt.format.files import bytes_digest, digest_blocks
from dist_ckpt.format.index import Box, Index
from dist_ckpt.format.manifest import FilesTotal, Manifest
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.planning.files import Document, RankShare, StagedFile, WrittenFile, build_index
from dist_ckpt.planning.owners import Owned, decide
from dist_ckpt.repository import Checkpoint, Repository, Transaction
from dist_ckpt.saving.snapshot import Stager
from dist_ckpt.state.layout import dtype_name
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.planning.boxes import held

_names = itertools.count()


def content(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bytes (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return (raw & 1 if dtype is torch.bool else raw).view(dtype).reshape(tuple(shape))


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the elements of `tensor` in `box`: the plain way to say it."""
    return tensor[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]


def local(name: str, tensor: torch.Tensor, box: Box) -> LocalBox:
    """Return `box` of `tensor` as one rank would hold it, in memory of its own."""
    dtype = dtype_name(tensor.dtype)
    return LocalBox(held(name, tensor.shape, box, dtype=dtype), cut(tensor, box).clone())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare bit for bit, NaNs included."""
    flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)]
    return left.shape == right.shape and torch.equal(*flat)


def stage(
    rank: int,
    local: Sequence[LocalBox],
    owned: Sequence[Owned],
    documents: Mapping[str, bytes] | None = None,
) -> Sequence[StagedFile]:
    """Return the files that `rank` writes."""
    stager = Stager(mode="blocking", memory_limit_bytes=None)
    staged = stager.stage(
        rank=rank, local=local, owned=owned, documents=documents or {}, write_out=_never
    )
    return staged.files


def _never(files: Sequence[StagedFile]) -> None:
    raise AssertionError("without a limit everything is in the arena at once")


def put(
    attempt: Transaction,
    by_rank: Sequence[Sequence[LocalBox]],
    documents_by_rank: Sequence[Mapping[str, bytes]] | None = None,
) -> Index:
    """Decide, stage and put what the ranks hold; return the index."""
    held_by_rank = [[box.held for box in boxes] for boxes in by_rank]
    shares = []
    for rank, owned in enumerate(decide(held_by_rank)):
        documents = documents_by_rank[rank] if documents_by_rank else {}
        staged = stage(rank, by_rank[rank], owned, documents)
        for file in staged:
            attempt.put_file(file.name, [file.image])
        written = [
            WrittenFile(f.name, len(f.image), digest_blocks(f.blocks, f.image), f.blocks)
            for f in staged
        ]
        told = [
            Document(part, False, len(data), bytes_digest(data)) for part, data in documents.items()
        ]
        shares.append(RankShare(held_by_rank[rank], owned, written, told))
    return build_index(shares)


def checkpoint(by_rank: Sequence[Sequence[LocalBox]]) -> Checkpoint:
    """Commit what the ranks hold as step 1 of a new run, and open it."""
    repository = Repository(MemoryStore(f"unit-dcp-{next(_names)}"))
    attempt = repository.begin(1, repository.claim())
    index = put(attempt, by_rank)

    draft = Manifest(
        step=1,
        save_id=attempt.save_id,
        claim=attempt.claim,
        created="2026-01-02T03:04:05+00:00",
        world_size=len(by_rank),
        versions={},
        parts=["model"],
        files=FilesTotal.of(file.nbytes for file in index.files),
        metrics={},
        metadata={},
        timings={},
        parent_step=None,
    )
    attempt.commit(encode_whole(index), draft)
    return repository.open(1)
