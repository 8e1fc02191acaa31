"""From wanted boxes to byte ranges of stored files, and from bytes to tensors.

A load never reads whole chunks: each wanted box is intersected with the stored ones, and only the
bytes between the first and the last wanted element of each intersection are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_ckpt.dcp.planner import LocalBox
from dist_ckpt.format.boxes import Box, element_span, intersect, split_rows, volume
from dist_ckpt.format.digest import BLOCK_BYTES
from dist_ckpt.format.index import Index
from dist_ckpt.format.shard import itemsize
from dist_ckpt.staging.copy import view_box
from dist_ckpt.storage.ranges import Piece, Segment, coalesce

MAX_SEGMENT_BYTES = 32 * BLOCK_BYTES
"""How much one read brings into memory, at most (a piece is cut by rows to fit)."""

_MAX_GAP_BYTES = 4 * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Read:
    """One piece of a stored chunk and where it goes.

    Attributes:
        piece: the bytes from the first to the last wanted element, in one file.
        chunk: the stored box that the bytes lie in.
        wanted: the box to copy, in elements of the global tensor.
        target: the local tensor it goes to.
        origin: global offsets of `target`.
    """

    piece: Piece
    chunk: Box
    wanted: Box
    target: torch.Tensor
    origin: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to read: pieces, and the block-aligned segments that hold them."""

    reads: Sequence[Read]
    segments: Sequence[Segment]

    @property
    def nbytes(self) -> int:
        """How many bytes the segments hold together."""
        return sum(segment.stop - segment.start for segment in self.segments)


def plan_reads(index: Index, targets: Sequence[LocalBox]) -> ReadPlan:
    """Find where the bytes of `targets` are stored.

    Args:
        index: the checkpoint's chunk table.
        targets: the local boxes to fill; the index has their tensors with equal shape and dtype.
    """
    numbers = {(entry.part, entry.name): i for i, entry in enumerate(index.tensors)}
    reads: list[Read] = []
    for target in targets:
        # An empty shard wants nothing, and no chunk has a common element with it.
        if volume(target.held.box):
            reads += _reads(index, numbers[target.held.part, target.held.name], target)
    segments = coalesce(
        [read.piece for read in reads],
        block_bytes=BLOCK_BYTES,
        max_gap_bytes=_MAX_GAP_BYTES,
        max_segment_bytes=MAX_SEGMENT_BYTES,
        file_sizes=[file.nbytes for file in index.files],
    )
    return ReadPlan(reads, segments)


def fill(read: Read, segment: Segment, data: memoryview) -> None:
    """Copy one piece out of the verified bytes of its segment into its target."""
    strides = _strides(read.chunk.sizes)
    dtype = read.target.dtype
    nbytes = read.piece.stop - read.piece.start
    # A view with the strides of the stored chunk: rows that the box does not want are stepped over.
    flat = torch.frombuffer(
        data,
        dtype=dtype,
        count=nbytes // dtype.itemsize,
        offset=read.piece.start - segment.start,
    )
    with torch.no_grad():
        source = flat.as_strided(read.wanted.sizes, strides)
        view_box(read.target, read.wanted, origin=read.origin).copy_(source)


def _reads(index: Index, tensor: int, target: LocalBox) -> list[Read]:
    rows = index.chunks_of(tensor)
    item = itemsize(index.tensors[tensor].dtype)
    box = target.held.box
    low = np.maximum(rows.starts, np.array(box.offsets, np.int64))
    high = np.minimum(
        rows.starts + rows.sizes, np.array(box.offsets, np.int64) + np.array(box.sizes, np.int64)
    )
    reads: list[Read] = []
    for i in np.flatnonzero((low < high).all(axis=1)):
        chunk = Box(tuple(map(int, rows.starts[i])), tuple(map(int, rows.sizes[i])))
        common = intersect(chunk, box)
        if common is None:
            continue
        for wanted in _bounded(chunk, common, item):
            first, stop = element_span(chunk, wanted)
            start = int(rows.offset[i])
            piece = Piece(int(rows.file[i]), start + first * item, start + stop * item)
            reads.append(Read(piece, chunk, wanted, target.memory, target.held.offsets))
    return reads


def _bounded(chunk: Box, wanted: Box, item: int) -> list[Box]:
    """Cut `wanted` until the span of each piece fits into a segment with room for alignment."""
    limit = MAX_SEGMENT_BYTES - 2 * BLOCK_BYTES
    first, stop = element_span(chunk, wanted)
    nbytes = (stop - first) * item
    if nbytes <= limit or volume(wanted) == 1:
        return [wanted]
    pieces = split_rows(wanted, -(-nbytes // limit))
    return [small for piece in pieces for small in _bounded(chunk, piece, item)]


def _strides(sizes: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    return tuple(strides)
