"""The index: which files a checkpoint has, which tensors, and where each chunk of them lies.

Chunks are columns, not objects: a checkpoint of thousands of ranks has millions of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import UsageError
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.digest import BLOCK_BYTES, DIGEST_BYTES, digest_blocks, file_digest


@dataclass(frozen=True)
class FileEntry:
    """One file of the attempt.

    Attributes:
        name: inside the directory of the save id.
        nbytes: its size.
        digest: of the file, 16 hex digits; empty where its blocks are not known here.
        blocks: digest of each block, 8 bytes each.
        lengths: of the blocks, uint32 each; empty where each has 1 MiB and the last one the rest.
    """

    name: str
    nbytes: int
    digest: str
    blocks: bytes
    lengths: bytes = field(default=b"", repr=False)

    @classmethod
    def of(
        cls, name: str, nbytes: int, blocks: bytes, lengths: Sequence[int] | NDArray[np.int64] = ()
    ) -> FileEntry:
        """Return the entry of a file, given the digests and the lengths of its blocks."""
        return cls(name, nbytes, file_digest(blocks), blocks, np.array(lengths, "<u4").tobytes())

    @cached_property
    def edges(self) -> NDArray[np.int64]:
        """Where its blocks begin and end: int64[blocks + 1], from 0 to its size."""
        if not self.lengths:
            grid = np.arange(0, self.nbytes, BLOCK_BYTES, dtype=np.int64)
            return np.append(grid, self.nbytes)
        lengths = np.frombuffer(self.lengths, "<u4")
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    def blocks_in(self, start: int, stop: int) -> tuple[int, int]:
        """Return the number of the block that begins at `start`, and that of the one at `stop`.

        Raises:
            UsageError: none does.
        """
        first, last = np.searchsorted(self.edges, (start, stop)).tolist()
        if last >= len(self.edges) or self.edges[[first, last]].tolist() != [start, stop]:
            raise UsageError(f"bytes {start} to {stop} of file {self.name} are not whole blocks")
        return first, last

    def find_damaged(self, start: int, *buffers: memoryview) -> tuple[int, int, int] | None:
        """Compare whole blocks from `start` on; return the first that differs, and where it lies.

        Raises:
            UsageError: these are no whole blocks.
        """
        first, last = self.blocks_in(start, start + sum(map(len, buffers)))
        edges = self.edges[first : last + 1].tolist()
        lengths = (b - a for a, b in itertools.pairwise(edges))
        found = digest_blocks(lengths, *buffers)
        stored = self.blocks[DIGEST_BYTES * first : DIGEST_BYTES * last]
        if found == stored:
            return None
        bad = next(at for at in range(len(found)) if found[at] != stored[at]) // DIGEST_BYTES
        return first + bad, edges[bad], edges[bad + 1]

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """Return where the blocks begin and end that hold the bytes `start:stop`."""
        first = int(np.searchsorted(self.edges, start, side="right")) - 1
        return int(self.edges[first]), int(self.edges[np.searchsorted(self.edges, stop)])

    def spans(self, most_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the file in pieces of whole blocks, of at most so many bytes or of one block."""
        first, edges = 0, self.edges
        while first + 1 < len(edges):
            last = int(np.searchsorted(edges, edges[first] + most_bytes, side="right")) - 1
            last = max(last, first + 1)
            yield int(edges[first]), int(edges[last])
            first = last


@decodable
class TensorEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: part and name, torch dtype without "torch.", global shape in elements."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@decodable
class ObjectEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The encoded Python values of one part.

    Attributes:
        part: which part.
        rank: whose values they are; None where all ranks share them.
        file: position in `Index.files`.
        offset: absolute byte offset in that file.
        nbytes: how many bytes they take.
        digest: of those bytes, 16 hex digits.
    """

    part: str
    rank: int | None
    file: int
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTable:
    """All chunks, one row each, sorted by tensor.

    Attributes:
        tensor: uint32[n], position in `Index.tensors`.
        file: uint32[n], position in `Index.files`.
        offset: uint64[n], absolute byte offset of the chunk in its file.
        boxes: flat int64, for each chunk `d` starts, then `d` sizes, `d` being that of its tensor.
    """

    tensor: NDArray[np.uint32]
    file: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    boxes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows:
    """The chunks of one tensor: views, not copies, of the columns.

    Attributes:
        file: uint32[n], position in `Index.files`.
        offset: uint64[n], absolute byte offset in the file.
        starts: int64[n, d], first index of the box.
        sizes: int64[n, d], extent of the box.
    """

    file: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """The whole description of one checkpoint's bytes.

    An index made by hand is whatever it was made of; `decode` and `encode` let only a valid one
    pass.
    """

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    objects: tuple[ObjectEntry, ...]
    chunks: ChunkTable
    _rows: NDArray[np.int64] = field(init=False, repr=False)
    _values: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.tensors)
        rows = np.searchsorted(self.chunks.tensor, np.arange(count + 1)).astype(np.int64)
        ndim = np.array([len(tensor.shape) for tensor in self.tensors], np.int64)
        values = np.zeros(count + 1, np.int64)
        np.cumsum(np.diff(rows) * ndim * 2, out=values[1:])
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_values", values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        mine, theirs = self.chunks, other.chunks
        return (self.files, self.tensors, self.objects) == (
            other.files,
            other.tensors,
            other.objects,
        ) and all(
            np.array_equal(a, b)
            for a, b in (
                (mine.tensor, theirs.tensor),
                (mine.file, theirs.file),
                (mine.offset, theirs.offset),
                (mine.boxes, theirs.boxes),
            )
        )

    def chunks_of(self, tensor_no: int) -> ChunkRows:
        """Return the chunks of tensor number `tensor_no`, in the order stored."""
        rows = slice(int(self._rows[tensor_no]), int(self._rows[tensor_no + 1]))
        values = slice(int(self._values[tensor_no]), int(self._values[tensor_no + 1]))
        ndim = len(self.tensors[tensor_no].shape)
        boxes = self.chunks.boxes[values].reshape(rows.stop - rows.start, 2, ndim)
        table = self.chunks
        return ChunkRows(table.file[rows], table.offset[rows], boxes[:, 0], boxes[:, 1])

    def rows_of(self, tensors: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each tensor number, its first row in `chunks` and the one behind its last."""
        return self._rows[tensors], self._rows[tensors + 1]

    def boxes(
        self, rows: NDArray[np.int64], ndim: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return int64[n, ndim] starts and sizes of the chunks in `rows`, all of `ndim` dims."""
        tensor = self.chunks.tensor[rows]
        place = self._values[tensor] + (rows - self._rows[tensor]) * (2 * ndim)
        flat = self.chunks.boxes[place[:, None] + np.arange(2 * ndim)]
        return flat[:, :ndim], flat[:, ndim:]

    @classmethod
    def build(
        cls,
        files: Sequence[FileEntry],
        tensors: Sequence[TensorEntry],
        objects: Sequence[ObjectEntry],
        rows: Iterable[tuple[int, int, int, Box]],
    ) -> Index:
        """Make an index from chunks in any order.

        Args:
            files: every file of the attempt but the index itself.
            tensors: every tensor of every part.
            objects: the encoded Python values of each part.
            rows: for each chunk, tensor number, file number, byte offset in the file, box.

        Raises:
            UsageError: a row names a tensor that does not exist, has a box of another number of
                dimensions than its tensor, or a number that its column cannot hold.
        """
        ordered = sorted(rows, key=lambda row: (row[0], row[3].offsets))
        flat: list[int] = []
        for number, _, _, box in ordered:
            if not 0 <= number < len(tensors):
                raise UsageError(f"a chunk names tensor {number}, there are {len(tensors)}")
            ndim = len(tensors[number].shape)
            if not len(box.offsets) == len(box.sizes) == ndim:
                raise UsageError(f"{box} of the {ndim}-dim tensor {tensors[number].name!r}")
            flat += box.offsets
            flat += box.sizes
        try:
            chunks = ChunkTable(
                np.array([row[0] for row in ordered], np.uint32),
                np.array([row[1] for row in ordered], np.uint32),
                np.array([row[2] for row in ordered], np.uint64),
                np.array(flat, np.int64),
            )
        except OverflowError as error:
            raise UsageError(f"a chunk has a number that no index can hold: {error}") from error
        return cls(tuple(files), tuple(tensors), tuple(objects), chunks)
