"""A segment of a checkpoint of format 2: where one rank put its chunks, and its digests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.digest import BLOCK_BYTES, DIGEST_BYTES, bytes_digest
from dist_ckpt.format.index_values import ChunkTable, FileEntry, Index, ObjectEntry
from dist_ckpt.format.root import Root, SegmentNote
from dist_ckpt.format.shard import DTYPES
from dist_ckpt.format.structure import RankChunks, Structure
from dist_ckpt.format.tables import (
    FORMAT,
    MOST_NAMES,
    Column,
    bad_index,
    check_lengths,
    column,
    decode_map,
    deflate,
    encode_map,
    inflate,
    positions,
    read_column,
    runs,
)

_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, eq=False)
class Segment:
    """What one rank wrote.

    Attributes:
        rank: which rank.
        files: its files.
        chunks: what is in them.
        file: int64[n], the position in `files` of the file that each chunk is in.
        offset: int64[n], the offset of its first byte there.
        objects: the documents; `file` is a position in `files`.
    """

    rank: int
    files: tuple[FileEntry, ...]
    chunks: RankChunks
    file: Column
    offset: Column
    objects: tuple[ObjectEntry, ...]

    def noted(self, data: bytes, *, inside: bool) -> SegmentNote:
        """Return what the root says of it, `data` being its bytes."""
        files = [(file.name, file.nbytes) for file in self.files]
        objects = [(entry.part, entry.rank is not None) for entry in self.objects]
        digest = bytes_digest(data)
        return SegmentNote(self.rank, len(data), digest, files, objects, data if inside else b"")


@decodable
class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    rank: int
    table: bytes
    digests: bytes


@decodable
class _Document(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    part: str
    own: bool
    file: int
    offset: int
    nbytes: int
    digest: str


@decodable
class _Table(msgspec.Struct, forbid_unknown_fields=True):
    blocks: bytes
    length: bytes
    tensor: bytes
    box: bytes
    file: bytes
    offset: bytes
    objects: Annotated[list[_Document], msgspec.Meta(max_length=MOST_NAMES)]


def encode(segment: Segment) -> bytes:
    """Return the bytes of `segment`, having read back all that needs no root.

    Raises:
        IntegrityError: `decode` would refuse them; the message says why.
        UsageError: there is too much of it.
    """
    lengths = [np.diff(file.edges) for file in segment.files]
    table = deflate(
        _Table(
            column([len(each) for each in lengths]),
            column(np.concatenate([np.zeros(0, np.int64), *lengths])),
            column(segment.chunks.tensor),
            column(segment.chunks.boxes),
            column(segment.file),
            column(segment.offset),
            [
                _Document(e.part, e.rank is not None, e.file, e.offset, e.nbytes, e.digest)
                for e in segment.objects
            ],
        )
    )
    digests = b"".join(file.blocks for file in segment.files)
    data = encode_map(_Wire(FORMAT, segment.rank, table, digests))
    # Nothing may be committed that no reader would take.
    _read(data, segment.noted(data, inside=False))
    return data


def decode(data: bytes, root: Root, place: int) -> Segment:
    """Read the segment at position `place` of `root`, trusting nothing in it.

    The caller has compared `data` with the digest in the root.

    Raises:
        IntegrityError: bad_index, or it does not describe what the root says that it does.
        IncompatibleError: a newer release wrote it.
    """
    note = root.segments[place]
    where = _where(note)
    table, files, objects = _read(data, note)
    file = read_column(table.file, most=len(files) - 1, where=f"a file in {where}")
    offset = read_column(table.offset, where=f"an offset in {where}")
    chunks = _chunks(table, root.structure, note.rank, where)
    check_lengths(where, (len(file), len(chunks.tensor)), (len(offset), len(chunks.tensor)))
    segment = Segment(note.rank, files, chunks, file, offset, objects)
    _check_bytes(segment, root.structure)
    return segment


def _where(note: SegmentNote) -> str:
    return f"the segment of rank {note.rank}"


def _read(
    data: bytes, note: SegmentNote
) -> tuple[_Table, tuple[FileEntry, ...], tuple[ObjectEntry, ...]]:
    """Read what is no chunk."""
    where = _where(note)
    wire = decode_map(data, _Wire, where=where)
    if wire.format != FORMAT:
        raise IncompatibleError(
            f"{where} is of format version {wire.format}, this program reads version {FORMAT}: "
            "use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    if wire.rank != note.rank:
        raise bad_index(f"{where} says that it is of rank {wire.rank}")
    table = inflate(wire.table, _Table, where=where)
    files = _files(table, wire.digests, note, where)
    return table, files, _objects(table, note, files, where)


def _files(table: _Table, digests: bytes, note: SegmentNote, where: str) -> tuple[FileEntry, ...]:
    counts = read_column(table.blocks, where=f"the count of blocks in {where}")
    lengths = read_column(table.length, most=BLOCK_BYTES, where=f"the length of a block in {where}")
    if len(lengths) and not int(lengths.min()):
        raise bad_index(f"{where} has a block without a byte")
    check_lengths(where, (len(counts), len(note.files)), (len(lengths), sum(counts.tolist())))
    check_lengths(where, (len(digests), DIGEST_BYTES * len(lengths)))
    ends = positions(counts).tolist()
    found = []
    for (name, nbytes), first, last in zip(note.files, ends, ends[1:], strict=False):
        mine = lengths[first:last]
        if int(mine.sum()) != nbytes:
            raise bad_index(f"the blocks of file {name} are not as long as it is")
        blocks = digests[first * DIGEST_BYTES : last * DIGEST_BYTES]
        found.append(FileEntry.of(name, nbytes, blocks, mine))
    return tuple(found)


def _chunks(table: _Table, structure: Structure, rank: int, where: str) -> RankChunks:
    tensor = read_column(table.tensor, where=f"a tensor in {where}")
    # Compared first: nothing is made of a length that the root claims.
    check_lengths(where, (len(tensor), structure.count_of(rank)))
    chunks = structure.chunks_of(rank)
    boxes = read_column(table.box, where=f"a box in {where}")
    if not (np.array_equal(tensor, chunks.tensor) and np.array_equal(boxes, chunks.boxes)):
        raise bad_index(f"{where} has other chunks than the root says")
    return chunks


def _objects(
    table: _Table, note: SegmentNote, files: Sequence[FileEntry], where: str
) -> tuple[ObjectEntry, ...]:
    if [(entry.part, entry.own) for entry in table.objects] != note.objects:
        raise bad_index(f"{where} has other values than the root says")
    if len({(entry.part, entry.file) for entry in table.objects}) != len(table.objects):
        raise bad_index(f"{where} has values of a part twice in one file")
    found = []
    for entry in table.objects:
        if not 0 <= entry.file < len(files) or _DIGEST.fullmatch(entry.digest) is None:
            raise bad_index(f"the values of part {entry.part!r} in {where} are in no file")
        nbytes = files[entry.file].nbytes
        if entry.offset < 0 or entry.nbytes < 0 or entry.offset + entry.nbytes > nbytes:
            raise bad_index(f"the values of part {entry.part!r} in {where} lie outside their file")
        owner = note.rank if entry.own else None
        place = (entry.file, entry.offset, entry.nbytes)
        found.append(ObjectEntry(entry.part, owner, *place, entry.digest))
    return tuple(found)


def chunk_nbytes(chunks: RankChunks, structure: Structure) -> Column:
    """Return how many bytes each chunk takes."""
    items = np.array([DTYPES[tensor.dtype][1] for tensor in structure.tensors], np.int64)
    ndim = structure.ndim[chunks.tensor]
    ends = positions(2 * ndim)
    nbytes = items[chunks.tensor].copy()
    for value in np.unique(ndim).tolist():
        mine = np.flatnonzero(ndim == value)
        for dim in range(value):
            # The boxes lie inside their tensors, whose bytes int64 holds: no overflow.
            nbytes[mine] *= chunks.boxes[ends[mine] + value + dim]
    return nbytes


def _check_bytes(segment: Segment, structure: Structure) -> None:
    nbytes = chunk_nbytes(segment.chunks, structure)
    ends = np.array([file.nbytes for file in segment.files], np.int64)[segment.file]
    outside = (segment.offset > ends) | (nbytes > ends - segment.offset)
    if outside.any():
        row = int(np.argmax(outside))
        tensor = structure.tensors[int(segment.chunks.tensor[row])]
        file = segment.files[int(segment.file[row])]
        raise bad_index(
            f"a chunk of tensor {tensor.name!r} takes {nbytes[row]} bytes at "
            f"{segment.offset[row]} of file {file.name}, which has {file.nbytes}"
        )


def join_segments(root: Root, segments: Mapping[int, Segment]) -> Index:
    """Return the index of what some segments describe, by their positions in `root`.

    It has all tensors and all files, and the chunks, documents and blocks of these segments alone.
    """
    structure = root.structure
    files = [FileEntry(*each, "", b"") for note in root.segments for each in note.files]
    objects: list[ObjectEntry] = []
    tensor, row, boxes, file, offset = ([np.zeros(0, np.int64)] for _ in range(5))
    for place, segment in sorted(segments.items()):
        first = root.first_files[place]
        files[first : first + len(segment.files)] = segment.files
        objects += [
            msgspec.structs.replace(entry, file=first + entry.file) for entry in segment.objects
        ]
        tensor.append(segment.chunks.tensor)
        row.append(segment.chunks.row)
        boxes.append(segment.chunks.boxes)
        file.append(segment.file + first)
        offset.append(segment.offset)
    columns = [np.concatenate(each) for each in (tensor, row, file, offset)]
    table = _sorted(structure, columns, np.concatenate(boxes))
    return Index(tuple(files), structure.tensors, tuple(objects), table)


def _sorted(structure: Structure, columns: Sequence[Column], boxes: Column) -> ChunkTable:
    """Sort chunks by tensor and row, with those that tied tensors share."""
    tensor, row, _, _ = columns
    order = np.lexsort((row, tensor))
    # A tied tensor has the chunks of another one, which come once more under its own number.
    heads = np.searchsorted(tensor[order], np.arange(len(structure.tensors) + 1))
    tied = np.flatnonzero(structure.owner != np.arange(len(structure.owner)))
    if len(tied):
        owners = structure.owner.tolist()
        shared = [order[heads[owner] : heads[owner + 1]] for owner in owners]
        order = np.concatenate([np.zeros(0, np.int64), *shared])
        numbers = np.repeat(np.arange(len(owners)), [len(rows) for rows in shared])
    else:
        numbers = tensor[order]
    width = 2 * structure.ndim[tensor]
    first = positions(width)[:-1]
    flat = boxes[runs(first[order], width[order])]
    _, _, file, offset = columns
    return ChunkTable(
        numbers.astype(np.uint32),
        file[order].astype(np.uint32),
        offset[order].astype(np.uint64),
        flat,
    )
