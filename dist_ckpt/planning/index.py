"""The index of a save: where each box of each tensor came to lie."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import msgspec
import torch

from dist_ckpt.format.boxes import Box
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry, TensorEntry
from dist_ckpt.planning.describe import Held
from dist_ckpt.planning.files import check_reported_sizes, extra_name, plan_extra, plan_files
from dist_ckpt.planning.holdings import TensorKey
from dist_ckpt.planning.owners import Owned


def versions() -> dict[str, str]:
    """Return what a manifest says of the programs that wrote it."""
    try:
        own = version("dist_ckpt")
    except PackageNotFoundError:  # run from a source tree that was never installed
        own = "unknown"
    return {"dist_ckpt": own, "torch": str(torch.__version__), "python": platform.python_version()}


class WrittenFile(msgspec.Struct, frozen=True, array_like=True):
    """What a rank reports of one file: its size, and of each block the digest and the length."""

    name: str
    nbytes: int
    blocks: bytes
    lengths: Sequence[int]


class Document(msgspec.Struct, frozen=True, array_like=True):
    """The encoded values of one part that a rank wrote into its `extra` file."""

    part: str
    per_rank: bool
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class RankShare:
    """All that the coordinator knows of one rank's share of a save."""

    held: Sequence[Held]
    owned: Sequence[Owned]
    files: Sequence[WrittenFile]
    documents: Sequence[Document]


def build_index(
    shares: Sequence[RankShare],
    *,
    ties: Mapping[TensorKey, str] | None = None,
    max_file_bytes: int | None = None,
) -> Index:
    """Check every rank's report against the plan and describe the whole checkpoint.

    Args:
        shares: by rank.
        ties: by tensor, the one in its part whose bytes are its bytes too.
        max_file_bytes: as the ranks gave it to `plan_files`.

    Raises:
        IntegrityError: a rank wrote other files than were planned.
    """
    files: list[FileEntry] = []
    tensors: dict[TensorEntry, int] = {}
    objects: list[ObjectEntry] = []
    rows: list[tuple[int, int, int, Box]] = []
    tied = _tied(ties or {})
    for rank, share in enumerate(shares):
        plans = plan_files(rank, share.held, share.owned, max_file_bytes=max_file_bytes)
        sizes = {document.part: document.nbytes for document in share.documents}
        check_reported_sizes(rank, plans, sizes, {f.name: f.nbytes for f in share.files})
        numbers = {file.name: len(files) + i for i, file in enumerate(share.files)}
        files += [FileEntry.of(f.name, f.nbytes, f.blocks, f.lengths) for f in share.files]
        for plan in plans:
            for box, offset in zip(plan.owned, plan.layout.offsets, strict=True):
                entry = share.held[box.held].tensor
                # Every name of one memory has rows of its own, which point to the same bytes.
                for name in (entry.name, *tied.get((entry.part, entry.name), ())):
                    one = TensorEntry(entry.part, name, entry.dtype, entry.shape)
                    tensor = tensors.setdefault(one, len(tensors))
                    rows.append((tensor, numbers[plan.name], offset, box.box))
        objects += _objects(rank, share.documents, numbers)
    return Index.build(files, list(tensors), objects, rows)


def _tied(ties: Mapping[TensorKey, str]) -> dict[TensorKey, list[str]]:
    names: dict[TensorKey, list[str]] = {}
    for (part, name), owner in ties.items():
        names.setdefault((part, owner), []).append(name)
    return names


def _objects(
    rank: int, documents: Sequence[Document], numbers: dict[str, int]
) -> Iterator[ObjectEntry]:
    if not documents:
        return
    offsets = plan_extra({document.part: document.nbytes for document in documents}).offsets
    for document, offset in zip(documents, offsets, strict=True):
        yield ObjectEntry(
            part=document.part,
            rank=rank if document.per_rank else None,
            file=numbers[extra_name(rank)],
            offset=offset,
            nbytes=document.nbytes,
            digest=document.digest,
        )
