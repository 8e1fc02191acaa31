"""The index of format 2: a segment of each rank, and the root, which vouches for all of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.files import BLOCK_BYTES, DIGEST_BYTES, DTYPES, FileEntry, bytes_digest
from dist_ckpt.format.index import ChunkTable, Index, ObjectEntry
from dist_ckpt.format.names import (
    EXTRA,
    FILES_LIMIT,
    FORMAT,
    LIMIT_BYTES,
    MOST_NAMES,
    RANK_LIMIT,
    Column,
    bad_index,
    check_distinct,
    check_lengths,
    column,
    decode_map,
    deflate,
    encode_map,
    inflate,
    is_part,
    parse_shard_name,
    positions,
    read_column,
    runs,
    shard_name,
)
from dist_ckpt.format.structure import RankChunks, Structure


@decodable
class SegmentNote(msgspec.Struct, frozen=True, array_like=True):
    """What the root says of one segment.

    Attributes:
        rank: whose it is.
        nbytes: its size.
        digest: of its bytes, 16 hex digits.
        files: name and size of each file it describes.
        objects: of each document it describes the part, and whether it is this rank's alone.
        inside: its bytes if it lies behind the root; empty where it is a file of its own.
    """

    rank: int
    nbytes: int
    digest: str
    files: list[tuple[str, int]]
    objects: list[tuple[str, bool]]
    inside: bytes = b""


@decodable
class Spent(msgspec.Struct, frozen=True):
    """What one rank spent on a save: seconds to stage, and to write."""

    stage_seconds: float
    write_seconds: float


@dataclass(frozen=True, eq=False)
class Root:
    """What finds the segments, and vouches for them.

    Attributes:
        structure: the tensors, and which rank holds which box of them.
        segments: by rank; those behind the root with their bytes.
        spent: by rank, where it was measured.
    """

    structure: Structure
    segments: tuple[SegmentNote, ...]
    spent: tuple[Spent, ...]

    @cached_property
    def first_files(self) -> list[int]:
        """The number of the first file of each segment among all of the checkpoint."""
        counts = np.array([len(each.files) for each in self.segments], np.int64)
        found: list[int] = positions(counts).tolist()
        return found

    @cached_property
    def place_of(self) -> Mapping[int, int]:
        """The position of the segment of each rank that has one."""
        return {each.rank: place for place, each in enumerate(self.segments)}

    def places_of(self, ranks: Column) -> list[int]:
        """Return the positions of the segments of `ranks`."""
        return [self.place_of[rank] for rank in ranks.tolist()]

    def places_of_part(self, part: str, *, rank: int) -> list[int]:
        """Return the positions of the segments with values of `part` that `rank` is to have."""
        return [
            place
            for place, each in enumerate(self.segments)
            if any(of == part and (not own or each.rank == rank) for of, own in each.objects)
        ]


@decodable
class _RootWire(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    # In bytes of its own: the saves of one plan share it, and it is encoded once for all of them.
    structure: bytes
    attempt: bytes
    segments: bytes


@decodable
class _Version(msgspec.Struct):
    format: int


@decodable
class _RootTable(msgspec.Struct, forbid_unknown_fields=True):
    rank: bytes
    nbytes: bytes
    digests: bytes
    inside: bytes
    files: bytes
    objects: bytes
    names: Annotated[list[str], msgspec.Meta(max_length=MOST_NAMES)]
    file_name: bytes
    file_number: bytes
    file_nbytes: bytes
    object_parts: Annotated[list[str], msgspec.Meta(max_length=MOST_NAMES)]
    object_part: bytes
    object_own: bytes
    stage_us: bytes
    write_us: bytes


def encode_root(
    structure: bytes, segments: Sequence[SegmentNote], spent: Sequence[Spent] = ()
) -> bytes:
    """Return the bytes of a root, having read back all but its structure.

    Args:
        structure: as `structure.encode` returned it, perhaps for a save before this one.
        segments: by rank.
        spent: by rank.

    Raises:
        IntegrityError: `decode_root` would refuse them; the message says why.
        UsageError: there is too much of it.
    """
    files = [_name(name, each.rank) for each in segments for name, _ in each.files]
    objects = [each for note in segments for each in note.objects]
    names = list(dict.fromkeys(name for name, _ in files))
    parts = list(dict.fromkeys(part for part, _ in objects))
    number_of = {name: number for number, name in enumerate(names)}
    part_of = {part: number for number, part in enumerate(parts)}
    attempt = deflate(
        _RootTable(
            column([each.rank for each in segments]),
            column([each.nbytes for each in segments]),
            b"".join(bytes.fromhex(each.digest) for each in segments),
            column([bool(each.inside) for each in segments]),
            column([len(each.files) for each in segments]),
            column([len(each.objects) for each in segments]),
            names,
            column([number_of[name] for name, _ in files]),
            column([number for _, number in files]),
            column([nbytes for each in segments for _, nbytes in each.files]),
            parts,
            column([part_of[part] for part, _ in objects]),
            column([own for _, own in objects]),
            column([round(each.stage_seconds * 1e6) for each in spent]),
            column([round(each.write_seconds * 1e6) for each in spent]),
        )
    )
    inside = b"".join(each.inside for each in segments)
    # Nothing may be committed that no reader would take.
    # The structure was read back when it was encoded, perhaps for a save before this one.
    _attempt(attempt, inside)
    return encode_map(_RootWire(FORMAT, structure, attempt, inside))


def decode_root(data: bytes) -> Root:
    """Read a root, trusting nothing in it.

    The caller has compared `data` with the digest in the manifest.

    Raises:
        IntegrityError: cut short, malformed, or a rule of the format is broken.
        IncompatibleError: another format version.
    """
    # First and by itself: the fields of another version are not known, and it is not damaged.
    version = _version(data)
    if version != FORMAT:
        raise IncompatibleError(
            f"index of format version {version}, this program reads version {FORMAT}: "
            "use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    wire = decode_map(data, _RootWire, where="the root")
    structure = structure_format.decode(wire.structure)
    segments, spent = _attempt(wire.attempt, wire.segments)
    ranks = {each.rank for each in segments}
    lost = set(structure.ranks.tolist()) - ranks
    if lost:
        raise bad_index(f"rank {min(lost)} holds boxes, and has no segment")
    return Root(structure, segments, spent)


def _version(data: bytes) -> int:
    try:
        return msgspec.msgpack.decode(data, type=_Version).format
    # RecursionError: how deep the bytes nest is chosen by whoever wrote them.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_index(f"the root cannot be decoded ({error})") from error


def _attempt(data: bytes, inside: bytes) -> tuple[tuple[SegmentNote, ...], tuple[Spent, ...]]:
    table = inflate(data, _RootTable, where="the root")
    rank = read_column(table.rank, most=RANK_LIMIT - 1, where="the rank of a segment")
    nbytes = read_column(table.nbytes, most=LIMIT_BYTES, where="the size of a segment")
    within = read_column(table.inside, most=1, where="the place of a segment").tolist()
    if (rank[1:] <= rank[:-1]).any():
        raise bad_index("the segments are not sorted by rank, or two are of one")
    count = len(rank)
    check_lengths("segments", (len(nbytes), count), (len(within), count))
    check_lengths("segments", (len(table.digests), count * DIGEST_BYTES))
    files = _root_files(table, rank)
    objects = _root_objects(table, count)
    sizes = [size * flag for size, flag in zip(nbytes.tolist(), within, strict=True)]
    # A segment inside has at least one byte: one of none would pass for a file of its own.
    if sum(sizes) != len(inside) or sizes.count(0) != within.count(0):
        raise bad_index("the segments behind the root are not as long as it says")
    ends = positions(np.array(sizes, np.int64)).tolist()
    segments = tuple(
        SegmentNote(
            int(rank[i]),
            int(nbytes[i]),
            table.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES].hex(),
            files[i],
            objects[i],
            inside[ends[i] : ends[i + 1]],
        )
        for i in range(count)
    )
    return segments, _spent(table)


def _root_files(table: _RootTable, rank: Column) -> list[list[tuple[str, int]]]:
    if not all(name == EXTRA or is_part(name) for name in table.names):
        raise bad_index("a file has a name that cannot be")
    check_distinct(table.names, "the list of names")
    counts = read_column(table.files, where="the count of files")
    name = read_column(table.file_name, most=len(table.names) - 1, where="the name of a file")
    number = read_column(table.file_number, most=FILES_LIMIT - 1, where="the number of a file")
    nbytes = read_column(table.file_nbytes, where="the size of a file")
    # In Python integers, as they may claim anything; only what fits is used as a length below.
    check_lengths("files", (len(counts), len(rank)), (len(name), sum(counts.tolist())))
    check_lengths("files", (len(number), len(name)), (len(nbytes), len(name)))
    owner = np.repeat(rank, counts)
    if len(np.unique(np.stack([owner, name, number]), axis=1).T) != len(name):
        raise bad_index("two files have the same name")
    # In Python integers: what is claimed together may be more than 64 bits hold.
    if sum(nbytes.tolist()) > structure_format.MOST_BYTES:
        raise bad_index("the files claim more bytes than there can be")
    columns = zip(name.tolist(), owner.tolist(), number.tolist(), nbytes.tolist(), strict=True)
    found = [(shard_name(table.names[n], r, number=k), size) for n, r, k, size in columns]
    ends = positions(counts).tolist()
    return [found[first:last] for first, last in itertools.pairwise(ends)]


def _root_objects(table: _RootTable, count: int) -> list[list[tuple[str, bool]]]:
    if not all(map(is_part, table.object_parts)):
        raise bad_index("values are of a part that cannot be")
    check_distinct(table.object_parts, "the list of parts")
    counts = read_column(table.objects, where="the count of values")
    part = read_column(table.object_part, most=len(table.object_parts) - 1, where="a part")
    own = read_column(table.object_own, most=1, where="whose values they are")
    check_lengths("values", (len(counts), count), (len(part), sum(counts.tolist())))
    check_lengths("values", (len(own), len(part)))
    pairs = zip(part.tolist(), own.tolist(), strict=True)
    found = [(table.object_parts[number], bool(flag)) for number, flag in pairs]
    ends = positions(counts).tolist()
    return [found[first:last] for first, last in itertools.pairwise(ends)]


def _spent(table: _RootTable) -> tuple[Spent, ...]:
    stage = read_column(table.stage_us, where="a time").tolist()
    write = read_column(table.write_us, where="a time").tolist()
    check_lengths("times", (len(stage), len(write)))
    return tuple(Spent(a / 1e6, b / 1e6) for a, b in zip(stage, write, strict=True))


def _name(name: str, rank: int) -> tuple[str, int]:
    """Return what the name of a file begins with, and the number of the file."""
    found = parse_shard_name(name)
    if found is None or found[1] != rank:
        raise bad_index(f"{name!r} is not the name of a shard file of rank {rank}")
    return found[0], found[2]


# A segment of a checkpoint of format 2: where one rank put its chunks, and its digests.


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
class _SegmentWire(msgspec.Struct, forbid_unknown_fields=True):
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
class _SegmentTable(msgspec.Struct, forbid_unknown_fields=True):
    blocks: bytes
    length: bytes
    tensor: bytes
    box: bytes
    file: bytes
    offset: bytes
    objects: Annotated[list[_Document], msgspec.Meta(max_length=MOST_NAMES)]


def encode_segment(segment: Segment) -> bytes:
    """Return the bytes of `segment`, having read back all that needs no root.

    Raises:
        IntegrityError: `decode_segment` would refuse them; the message says why.
        UsageError: there is too much of it.
    """
    # Stored, as readers must not compute them: another writer may cut its files otherwise.
    lengths = [np.diff(file.edges) for file in segment.files]
    table = deflate(
        _SegmentTable(
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
    data = encode_map(_SegmentWire(FORMAT, segment.rank, table, digests))
    # Nothing may be committed that no reader would take.
    _read_segment(data, segment.noted(data, inside=False))
    return data


def decode_segment(data: bytes, root: Root, place: int) -> Segment:
    """Read the segment at position `place` of `root`, trusting nothing in it.

    The caller has compared `data` with the digest in the root.

    Raises:
        IntegrityError: malformed, or it does not describe what the root says that it does.
        IncompatibleError: a newer release wrote it.
    """
    note = root.segments[place]
    where = _where(note)
    table, files, objects = _read_segment(data, note)
    file = read_column(table.file, most=len(files) - 1, where=f"a file in {where}")
    offset = read_column(table.offset, where=f"an offset in {where}")
    chunks = _chunks(table, root.structure, note.rank, where)
    check_lengths(where, (len(file), len(chunks.tensor)), (len(offset), len(chunks.tensor)))
    segment = Segment(note.rank, files, chunks, file, offset, objects)
    _check_bytes(segment, root.structure)
    return segment


def _where(note: SegmentNote) -> str:
    return f"the segment of rank {note.rank}"


def _read_segment(
    data: bytes, note: SegmentNote
) -> tuple[_SegmentTable, tuple[FileEntry, ...], tuple[ObjectEntry, ...]]:
    """Read what is no chunk."""
    where = _where(note)
    wire = decode_map(data, _SegmentWire, where=where)
    if wire.format != FORMAT:
        raise IncompatibleError(
            f"{where} is of format version {wire.format}, this program reads version {FORMAT}: "
            "use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    if wire.rank != note.rank:
        raise bad_index(f"{where} says that it is of rank {wire.rank}")
    table = inflate(wire.table, _SegmentTable, where=where)
    files = _segment_files(table, wire.digests, note, where)
    return table, files, _segment_objects(table, note, files, where)


def _segment_files(
    table: _SegmentTable, digests: bytes, note: SegmentNote, where: str
) -> tuple[FileEntry, ...]:
    counts = read_column(table.blocks, where=f"the count of blocks in {where}")
    lengths = read_column(table.length, most=BLOCK_BYTES, where=f"the length of a block in {where}")
    # Two edges would be equal, and blocks are found by their edges.
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


def _chunks(table: _SegmentTable, structure: Structure, rank: int, where: str) -> RankChunks:
    tensor = read_column(table.tensor, where=f"a tensor in {where}")
    # Compared first: nothing is made of a length that the root claims.
    check_lengths(where, (len(tensor), structure.count_of(rank)))
    chunks = structure.chunks_of(rank)
    # Stored although the root has them: so a segment that was written by another plan is found out.
    boxes = read_column(table.box, where=f"a box in {where}")
    if not (np.array_equal(tensor, chunks.tensor) and np.array_equal(boxes, chunks.boxes)):
        raise bad_index(f"{where} has other chunks than the root says")
    return chunks


def _segment_objects(
    table: _SegmentTable, note: SegmentNote, files: Sequence[FileEntry], where: str
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
    # By differences, as a sum of two claimed numbers could overflow.
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
    # Also those of other segments, so that the number of a file is the same in every index.
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
