"""An index that one process has whole, as a root with all segments behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from dist_ckpt.format import root as root_format
from dist_ckpt.format import segment as segment_format
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.index_values import FileEntry, Index, TensorEntry
from dist_ckpt.format.names import parse_shard_name
from dist_ckpt.format.root import Spent
from dist_ckpt.format.segment import Segment
from dist_ckpt.format.structure import Cut, RankChunks, Structure, structure_of
from dist_ckpt.format.tables import Column, bad_index


def encode_whole(index: Index, spent: Sequence[Spent] = ()) -> bytes:
    """Return the root of what `index` describes, with all segments behind it.

    Raises:
        IntegrityError: no reader would take it; the message says why.
        UsageError: a name is not Unicode text, or there is too much of it.
    """
    structure = structure_of(*_cuts(index))
    if len(structure.tensors) != len(index.tensors):
        raise bad_index("two tensors of one part have the same name")
    encoded = structure_format.encode(structure)
    segments = [_segment(index, structure, rank) for rank in _ranks(index.files)]
    notes = [each.noted(segment_format.encode(each), inside=True) for each in segments]
    data = root_format.encode(encoded, notes, spent)
    # Nothing may be committed that no reader would take.
    root = root_format.decode(data)
    for place, note in enumerate(notes):
        segment_format.decode(note.inside, root, place)
    return data


def _ranks(files: Iterable[FileEntry]) -> list[int]:
    return sorted({_rank_of(file) for file in files})


def _rank_of(file: FileEntry) -> int:
    found = parse_shard_name(file.name)
    if found is None:
        raise bad_index(f"{file.name!r} is not the name of a shard file")
    return found[1]


def _cuts(
    index: Index,
) -> tuple[dict[TensorEntry, list[Cut]], dict[TensorEntry, TensorEntry]]:
    """Return how the tensors of `index` are cut, and which of them have the bytes of another."""
    ranks = [_rank_of(file) for file in index.files]
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


def _segment(index: Index, structure: Structure, rank: int) -> Segment:
    numbers = [n for n, file in enumerate(index.files) if _rank_of(file) == rank]
    local = {number: place for place, number in enumerate(numbers)}
    chunks = structure.chunks_of(rank)
    at = _rows_in(index, structure, chunks)
    if any(entry.rank not in (None, rank) for entry in index.objects if entry.file in local):
        raise bad_index(f"values of another rank are in a file of rank {rank}")
    objects = [
        msgspec.structs.replace(entry, file=local[entry.file])
        for entry in index.objects
        if entry.file in local
    ]
    return Segment(
        rank,
        tuple(index.files[number] for number in numbers),
        chunks,
        np.array([local[file] for file in index.chunks.file[at].tolist()], np.int64),
        index.chunks.offset[at].astype(np.int64),
        tuple(objects),
    )


def _rows_in(index: Index, structure: Structure, chunks: RankChunks) -> Column:
    """Return which rows of `index` the chunks are, whose tensors may have them in another order."""
    places: dict[tuple[object, ...], int] = {}
    found = []
    for number in np.unique(chunks.tensor).tolist():
        rows = index.chunks_of(number)
        first = int(index.rows_of(np.array([number]))[0][0])
        for row, start in enumerate(rows.starts.tolist()):
            places[number, *start] = first + row
    for number, row in zip(chunks.tensor.tolist(), chunks.row.tolist(), strict=True):
        start = structure.layouts[int(structure.layout[number])].starts[row].tolist()
        found.append(places[number, *start])
    return np.array(found, np.int64)
