"""An index that one process has whole: as one object, or as a root with all segments behind it.

The one object is the index of format 1; the other is what format 2 has in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.files import DIGEST_BYTES, DTYPES, FileEntry, block_count, file_digest
from dist_ckpt.format.index import (
    ChunkTable,
    Index,
    ObjectEntry,
    TensorEntry,
    check_tensors,
    find_uncovered,
)
from dist_ckpt.format.names import (
    INT64_MAX,
    RANK_LIMIT,
    Column,
    bad_index,
    is_part,
    parse_shard_name,
)
from dist_ckpt.format.segments import (
    Segment,
    Spent,
    decode_root,
    decode_segment,
    encode_root,
    encode_segment,
)
from dist_ckpt.format.structure import Cut, RankChunks, Structure, structure_of

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
    # Before any box: the arithmetic of boxes rests on sizes whose product int64 holds.
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
        # Once for the file: from here on each block is compared by its own digest in the list.
        if file_digest(file.blocks) != file.digest:
            raise IntegrityError(
                f"index: the block digests of file {file.name} differ from its digest. "
                "Use another checkpoint"
            )


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
    # `Index` finds the chunks of a tensor by this order.
    if (chunks.tensor[1:] < chunks.tensor[:-1]).any():
        raise bad_index("the chunks are not sorted by tensor")
    if (chunks.tensor >= len(tensors)).any() or (chunks.file >= len(files)).any():
        raise bad_index("a chunk is of a tensor, or in a file, that does not exist")
    ndim = np.array([len(tensor.shape) for tensor in tensors], np.int64)
    if int(ndim[chunks.tensor].sum()) * 2 != len(chunks.boxes):
        raise bad_index("the boxes do not fit the dimensions of their tensors")
    # Here, as the search for holes is only given tensors of which there is a chunk.
    counts = np.bincount(chunks.tensor, minlength=len(tensors))
    if not counts.all():
        tensor = tensors[int(np.argmin(counts))]
        raise _uncovered(tensor, "missing: it has no chunk")


def _by_ndim(
    chunks: ChunkTable, tensors: tuple[TensorEntry, ...]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (row numbers, starts, sizes) of all chunks of 0 dimensions, then of 1, ..."""
    ndim = np.array([len(tensor.shape) for tensor in tensors], np.int64)[chunks.tensor]
    # Arrays are rectangular, so chunks of as many dimensions are checked together.
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


# The same as a root of format 2, with all segments behind it.


def encode_whole(index: Index, spent: Sequence[Spent] = ()) -> bytes:
    """Return the root of what `index` describes, with all segments behind it.

    Raises:
        IntegrityError: no reader would take it; the message says why.
        UsageError: a name is not Unicode text, or there is too much of it.
    """
    ranks = [_rank_of(file) for file in index.files]
    structure = structure_of(*_cuts(index, ranks))
    # Equal entries fell together, as they are the keys of one mapping.
    if len(structure.tensors) != len(index.tensors):
        raise bad_index("two tensors of one part have the same name")
    encoded = structure_format.encode(structure)
    segments = _segments(index, structure, ranks)
    notes = [each.noted(encode_segment(each), inside=True) for each in segments]
    data = encode_root(encoded, notes, spent)
    # Nothing may be committed that no reader would take.
    root = decode_root(data)
    for place, note in enumerate(notes):
        decode_segment(note.inside, root, place)
    return data


def _rank_of(file: FileEntry) -> int:
    found = parse_shard_name(file.name)
    if found is None:
        raise bad_index(f"{file.name!r} is not the name of a shard file")
    return found[1]


def _cuts(
    index: Index, ranks: Sequence[int]
) -> tuple[dict[TensorEntry, list[Cut]], dict[TensorEntry, TensorEntry]]:
    """Return how the tensors of `index` are cut, and which of them have the bytes of another."""
    cuts: dict[TensorEntry, list[Cut]] = {}
    owners: dict[TensorEntry, TensorEntry] = {}
    known: dict[object, TensorEntry] = {}
    for number, tensor in enumerate(index.tensors):
        rows = index.chunks_of(number)
        boxes = zip(rows.file.tolist(), rows.starts.tolist(), rows.sizes.tolist(), strict=True)
        cuts[tensor] = [(ranks[file], tuple(start), tuple(size)) for file, start, size in boxes]
        # Format 1 does not say which tensors are tied: those that take the very same bytes are.
        columns = (rows.file, rows.offset, rows.starts, rows.sizes)
        place = (tensor.part, tensor.dtype, tensor.shape, *(each.tobytes() for each in columns))
        other = known.setdefault(place, tensor)
        if other is not tensor:
            owners[tensor] = other
    return cuts, owners


def _segments(index: Index, structure: Structure, ranks: Sequence[int]) -> list[Segment]:
    """Return what each of `ranks`, which are those of the files, wrote."""
    files: dict[int, list[int]] = {rank: [] for rank in sorted(set(ranks))}
    for number, rank in enumerate(ranks):
        files[rank].append(number)
    objects: dict[int, list[ObjectEntry]] = {rank: [] for rank in files}
    for entry in index.objects:
        rank = ranks[entry.file]
        if entry.rank not in (None, rank):
            raise bad_index(f"values of another rank are in a file of rank {rank}")
        objects[rank].append(entry)
    rows = _rows_of(index)
    return [
        _segment(index, structure, rank, numbers, objects[rank], rows)
        for rank, numbers in files.items()
    ]


_Rows = Mapping[tuple[int, ...], int]
"""By the number of a tensor and where a chunk of it starts: which row of the index that is."""


def _rows_of(index: Index) -> _Rows:
    rows: dict[tuple[int, ...], int] = {}
    for number in range(len(index.tensors)):
        for start in index.chunks_of(number).starts.tolist():
            rows[number, *start] = len(rows)  # the rows of an index are sorted by tensor
    return rows


def _segment(
    index: Index,
    structure: Structure,
    rank: int,
    files: Sequence[int],
    objects: Sequence[ObjectEntry],
    rows: _Rows,
) -> Segment:
    local = {number: place for place, number in enumerate(files)}
    chunks = structure.chunks_of(rank)
    at = _rows_in(structure, chunks, rows)
    return Segment(
        rank,
        tuple(index.files[number] for number in files),
        chunks,
        np.array([local[file] for file in index.chunks.file[at].tolist()], np.int64),
        index.chunks.offset[at].astype(np.int64),
        tuple(msgspec.structs.replace(each, file=local[each.file]) for each in objects),
    )


def _rows_in(structure: Structure, chunks: RankChunks, rows: _Rows) -> Column:
    """Return which rows of the index the chunks are: tensors may have them in another order."""
    found = []
    for number, row in zip(chunks.tensor.tolist(), chunks.row.tolist(), strict=True):
        start = structure.layouts[int(structure.layout[number])].starts[row].tolist()
        found.append(rows[number, *start])
    return np.array(found, np.int64)
