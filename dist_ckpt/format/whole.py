"""An index that one process has whole, as a root with all segments behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.index import FileEntry, Index, ObjectEntry, TensorEntry
from dist_ckpt.format.limits import Column, bad_index
from dist_ckpt.format.names import parse_shard_name
from dist_ckpt.format.segments import (
    Segment,
    Spent,
    decode_root,
    decode_segment,
    encode_root,
    encode_segment,
)
from dist_ckpt.format.structure import Cut, RankChunks, Structure, structure_of


def encode_whole(index: Index, spent: Sequence[Spent] = ()) -> bytes:
    """Return the root of what `index` describes, with all segments behind it.

    Raises:
        IntegrityError: no reader would take it; the message says why.
        UsageError: a name is not Unicode text, or there is too much of it.
    """
    ranks = [_rank_of(file) for file in index.files]
    structure = structure_of(*_cuts(index, ranks))
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
