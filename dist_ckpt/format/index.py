"""The index: which files a checkpoint has, which tensors, where each chunk of them lies.

Chunks are columns, not objects: a checkpoint of thousands of ranks has millions of them. How all of
it is written differs from format to format: in format 1 as one object (`encode`, `decode`), in
format 2 by each rank (`dist_ckpt.format.segments`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format.boxes import Box, find_uncovered
from dist_ckpt.format.digest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    block_count,
    digest_blocks,
    file_digest,
)
from dist_ckpt.format.limits import INT64_MAX, bad_index, count_elements
from dist_ckpt.format.names import RANK_LIMIT, is_part, parse_shard_name
from dist_ckpt.format.shard import DTYPES


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


# The index of format 1, which is one object: its bytes, and their strict reading.


FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{16}")

_Number = TypeVar("_Number", np.uint32, np.uint64, np.int64)


@decodable
class _Version(msgspec.Struct):
    format: int


@decodable
class _WireFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str
    nbytes: int
    digest: str
    blocks: bytes


@decodable
class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    files: tuple[_WireFile, ...]
    tensors: tuple[TensorEntry, ...]
    objects: tuple[ObjectEntry, ...]
    chunk_tensor: bytes
    chunk_file: bytes
    chunk_offset: bytes
    chunk_box: bytes


def encode(index: Index) -> bytes:
    """Return the bytes of `index`, having read them back.

    Raises:
        IntegrityError: `decode` would refuse them; the message says why.
        UsageError: a name that is not Unicode text, or a number over 64 bits.
    """
    chunks = index.chunks
    wire = _Wire(
        FORMAT,
        tuple(_WireFile(f.name, f.nbytes, f.digest, f.blocks) for f in index.files),
        index.tensors,
        index.objects,
        chunks.tensor.astype("<u4").tobytes(),
        chunks.file.astype("<u4").tobytes(),
        chunks.offset.astype("<u8").tobytes(),
        chunks.boxes.astype("<i8").tobytes(),
    )
    try:
        data = msgspec.msgpack.encode(wire)
    except (UnicodeEncodeError, OverflowError) as error:
        raise UsageError(f"the index cannot hold this state: {error}") from error
    # Nothing may be committed that no reader would take.
    decode(data)
    return data


def decode(data: bytes) -> Index:
    """Read an index, trusting nothing in it; nothing is allocated by a size that it claims.

    The caller has compared `data` with the digest in the manifest.

    Raises:
        IntegrityError: cut short, malformed, or a rule of the format is broken: chunks that do
            not tile their tensor, bytes outside their file, a name or a number out of range.
        IncompatibleError: another format version.
    """
    try:
        version = msgspec.msgpack.decode(data, type=_Version).format
        if version != FORMAT:
            raise IncompatibleError(
                f"index of format version {version}, this program reads version {FORMAT}: "
                "use the release that wrote it or a newer one",
                kind=ErrorKind.VERSION,
            )
        wire = msgspec.msgpack.decode(data, type=_Wire)
    # RecursionError: how deep the bytes nest is chosen by whoever wrote them.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_index(f"it cannot be decoded ({error})") from error
    files = tuple(FileEntry(f.name, f.nbytes, f.digest, f.blocks) for f in wire.files)
    _check_files(files)
    check_tensors(wire.tensors)
    _check_objects(wire.objects, files)
    chunks = ChunkTable(
        _column(wire.chunk_tensor, np.uint32),
        _column(wire.chunk_file, np.uint32),
        _column(wire.chunk_offset, np.uint64),
        _column(wire.chunk_box, np.int64),
    )
    _check_columns(chunks, files, wire.tensors)
    for number, starts, sizes in _by_ndim(chunks, wire.tensors):
        _check_tiles(wire.tensors, chunks.tensor[number], starts, sizes)
        _check_bytes(files, wire.tensors, chunks, (number, sizes))
    return Index(files, wire.tensors, wire.objects, chunks)


def _check_files(files: tuple[FileEntry, ...]) -> None:
    if len({file.name for file in files}) != len(files):
        raise bad_index("two files have the same name")
    for file in files:
        # The one pattern keeps every key inside the directory of the save id.
        if parse_shard_name(file.name) is None:
            raise bad_index(f"{file.name!r} is not the name of a shard file")
        if not 0 <= file.nbytes <= INT64_MAX:
            raise bad_index(f"file {file.name} claims {file.nbytes} bytes")
        if len(file.blocks) != DIGEST_BYTES * block_count(file.nbytes):
            raise bad_index(
                f"file {file.name} of {file.nbytes} bytes has {len(file.blocks)} bytes of digests"
            )
        if file_digest(file.blocks) != file.digest:
            raise IntegrityError(
                f"index: the block digests of file {file.name} differ from its digest. "
                "Use another checkpoint"
            )


def check_tensors(tensors: Sequence[TensorEntry]) -> None:
    """Check names, types and shapes of tensors.

    Raises:
        IntegrityError: one cannot be, or two of one part have the same name.
    """
    if len({(tensor.part, tensor.name) for tensor in tensors}) != len(tensors):
        raise bad_index("two tensors of one part have the same name")
    for tensor in tensors:
        where = f"tensor {tensor.name!r} of part {tensor.part!r}"
        if not is_part(tensor.part) or tensor.name == "__metadata__":
            raise bad_index(f"{where} has a name that cannot be")
        if tensor.dtype not in DTYPES:
            raise bad_index(f"{where} has the unknown dtype {tensor.dtype!r}")
        try:
            elements = count_elements(tensor.shape)
        except ValueError as error:
            raise bad_index(f"{where} has an impossible shape: {error}") from error
        # In Python integers: from here on, no product of sizes that lie inside can overflow int64.
        if elements * DTYPES[tensor.dtype][1] > INT64_MAX:
            raise bad_index(f"{where} claims more than 2**63 bytes")


def _check_objects(objects: tuple[ObjectEntry, ...], files: tuple[FileEntry, ...]) -> None:
    # Several files may hold shared values of one part: stages of a pipeline each have their own.
    if len({(entry.part, entry.rank, entry.file) for entry in objects}) != len(objects):
        raise bad_index("a part has its Python values twice in one file")
    for entry in objects:
        where = f"the Python values of part {entry.part!r}"
        if not is_part(entry.part):
            raise bad_index(f"{where} have a name that cannot be")
        if entry.rank is not None and not 0 <= entry.rank < RANK_LIMIT:
            raise bad_index(f"{where} are of rank {entry.rank}")
        if not 0 <= entry.file < len(files):
            raise bad_index(f"{where} are in file {entry.file} of {len(files)}")
        file = files[entry.file]
        if entry.offset < 0 or entry.nbytes < 0 or entry.offset + entry.nbytes > file.nbytes:
            raise bad_index(
                f"{where} take {entry.nbytes} bytes at {entry.offset} of file {file.name}, "
                f"which has {file.nbytes}"
            )
        if _DIGEST.fullmatch(entry.digest) is None:
            raise bad_index(f"{where} have no digest")


def _column(data: bytes, kind: type[_Number]) -> NDArray[_Number]:
    dtype = np.dtype(kind).newbyteorder("<")
    if len(data) % dtype.itemsize:
        raise bad_index(f"a column of chunks of {len(data)} bytes is no array of {dtype}")
    return np.frombuffer(data, dtype)


def _check_columns(
    chunks: ChunkTable, files: tuple[FileEntry, ...], tensors: tuple[TensorEntry, ...]
) -> None:
    if not len(chunks.tensor) == len(chunks.file) == len(chunks.offset):
        raise bad_index("the columns of chunks differ in length")
    if (chunks.tensor[1:] < chunks.tensor[:-1]).any():
        raise bad_index("the chunks are not sorted by tensor")
    if (chunks.tensor >= len(tensors)).any() or (chunks.file >= len(files)).any():
        raise bad_index("a chunk is of a tensor, or in a file, that does not exist")
    ndim = np.array([len(tensor.shape) for tensor in tensors], np.int64)
    if int(ndim[chunks.tensor].sum()) * 2 != len(chunks.boxes):
        raise bad_index("the boxes do not fit the dimensions of their tensors")
    counts = np.bincount(chunks.tensor, minlength=len(tensors))
    if not counts.all():
        tensor = tensors[int(np.argmin(counts))]
        raise _uncovered(tensor, "missing: it has no chunk")


def _by_ndim(
    chunks: ChunkTable, tensors: tuple[TensorEntry, ...]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (row numbers, starts, sizes) of all chunks of 0 dimensions, then of 1, ..."""
    ndim = np.array([len(tensor.shape) for tensor in tensors], np.int64)[chunks.tensor]
    for value in np.unique(ndim).tolist():
        mine = ndim == value
        rows = np.flatnonzero(mine)
        flat = chunks.boxes if mine.all() else chunks.boxes[np.repeat(mine, 2 * ndim)]
        boxes = flat.reshape(len(rows), 2, value)
        yield rows, boxes[:, 0], boxes[:, 1]


def _check_tiles(
    tensors: tuple[TensorEntry, ...],
    owner: NDArray[np.uint32],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> None:
    numbers, counts = np.unique(owner, return_counts=True)
    shapes = np.array([tensors[number].shape for number in numbers], np.int64)
    shapes = shapes.reshape(len(numbers), starts.shape[1])
    bad = find_uncovered(shapes, counts.astype(np.int64), starts, sizes)
    if bad is not None:
        raise _uncovered(tensors[numbers[bad[0]]], bad[1])


def _check_bytes(
    files: Sequence[FileEntry],
    tensors: Sequence[TensorEntry],
    chunks: ChunkTable,
    boxes: tuple[NDArray[np.intp], NDArray[np.int64]],
) -> None:
    number, sizes = boxes
    items = np.array([DTYPES[tensor.dtype][1] for tensor in tensors], np.int64)
    # The boxes lie inside their tensors, whose bytes int64 holds: the product cannot overflow.
    nbytes = (sizes.prod(axis=1) * items[chunks.tensor[number]]).astype(np.uint64)
    ends = np.array([file.nbytes for file in files], np.uint64)[chunks.file[number]]
    offset = chunks.offset[number]
    # `ends - offset` may wrap only where `offset > ends` has already condemned the row.
    outside = (offset > ends) | (nbytes > ends - offset)
    if outside.any():
        row = int(np.argmax(outside))
        tensor = tensors[chunks.tensor[number[row]]]
        file = files[chunks.file[number[row]]]
        raise bad_index(
            f"a chunk of tensor {tensor.name!r} takes {nbytes[row]} bytes at {offset[row]} "
            f"of file {file.name}, which has {file.nbytes}"
        )


def _uncovered(tensor: TensorEntry, problem: str) -> IntegrityError:
    return IntegrityError(
        f"index: the chunks of tensor {tensor.name!r} of part {tensor.part!r} do not hold each "
        f"element once: {problem}. Use another checkpoint",
        kind=ErrorKind.COVERAGE,
    )
