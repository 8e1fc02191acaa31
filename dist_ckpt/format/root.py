"""The root of a checkpoint of format 2: its structure, and what vouches for its segments."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.digest import DIGEST_BYTES
from dist_ckpt.format.names import (
    EXTRA,
    FILES_LIMIT,
    RANK_LIMIT,
    is_part,
    parse_shard_name,
    shard_name,
)
from dist_ckpt.format.structure import Structure
from dist_ckpt.format.tables import (
    FORMAT,
    LIMIT_BYTES,
    MOST_NAMES,
    Column,
    bad_index,
    check_distinct,
    check_lengths,
    column,
    decode_map,
    deflate,
    encode_map,
    inflate,
    positions,
    read_column,
)


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
class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    structure: bytes
    attempt: bytes
    segments: bytes


@decodable
class _Version(msgspec.Struct):
    format: int


@decodable
class _Table(msgspec.Struct, forbid_unknown_fields=True):
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


def encode(structure: bytes, segments: Sequence[SegmentNote], spent: Sequence[Spent] = ()) -> bytes:
    """Return the bytes of a root, having read back all but its structure.

    Args:
        structure: as `structure.encode` returned it, perhaps for a save before this one.
        segments: by rank.
        spent: by rank.

    Raises:
        IntegrityError: `decode` would refuse them; the message says why.
        UsageError: there is too much of it.
    """
    files = [_name(name, each.rank) for each in segments for name, _ in each.files]
    objects = [each for note in segments for each in note.objects]
    names = list(dict.fromkeys(name for name, _ in files))
    parts = list(dict.fromkeys(part for part, _ in objects))
    number_of = {name: number for number, name in enumerate(names)}
    part_of = {part: number for number, part in enumerate(parts)}
    attempt = deflate(
        _Table(
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
    _attempt(attempt, inside)
    return encode_map(_Wire(FORMAT, structure, attempt, inside))


def decode(data: bytes) -> Root:
    """Read a root, trusting nothing in it.

    The caller has compared `data` with the digest in the manifest.

    Raises:
        IntegrityError: cut short, bad_index, or a rule of the format is broken.
        IncompatibleError: another format version.
    """
    version = _version(data)
    if version != FORMAT:
        raise IncompatibleError(
            f"index of format version {version}, this program reads version {FORMAT}: "
            "use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    wire = decode_map(data, _Wire, where="the root")
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
    table = inflate(data, _Table, where="the root")
    rank = read_column(table.rank, most=RANK_LIMIT - 1, where="the rank of a segment")
    nbytes = read_column(table.nbytes, most=LIMIT_BYTES, where="the size of a segment")
    within = read_column(table.inside, most=1, where="the place of a segment").tolist()
    if (rank[1:] <= rank[:-1]).any():
        raise bad_index("the segments are not sorted by rank, or two are of one")
    count = len(rank)
    check_lengths("segments", (len(nbytes), count), (len(within), count))
    check_lengths("segments", (len(table.digests), count * DIGEST_BYTES))
    files = _files(table, rank)
    objects = _objects(table, count)
    sizes = [size * flag for size, flag in zip(nbytes.tolist(), within, strict=True)]
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


def _files(table: _Table, rank: Column) -> list[list[tuple[str, int]]]:
    if not all(name == EXTRA or is_part(name) for name in table.names):
        raise bad_index("a file has a name that cannot be")
    check_distinct(table.names, "the list of names")
    counts = read_column(table.files, where="the count of files")
    name = read_column(table.file_name, most=len(table.names) - 1, where="the name of a file")
    number = read_column(table.file_number, most=FILES_LIMIT - 1, where="the number of a file")
    nbytes = read_column(table.file_nbytes, where="the size of a file")
    check_lengths("files", (len(counts), len(rank)), (len(name), sum(counts.tolist())))
    check_lengths("files", (len(number), len(name)), (len(nbytes), len(name)))
    owner = np.repeat(rank, counts)
    if len(np.unique(np.stack([owner, name, number]), axis=1).T) != len(name):
        raise bad_index("two files have the same name")
    if sum(nbytes.tolist()) > structure_format.MOST_BYTES:
        raise bad_index("the files claim more bytes than there can be")
    columns = zip(name.tolist(), owner.tolist(), number.tolist(), nbytes.tolist(), strict=True)
    found = [(shard_name(table.names[n], r, number=k), size) for n, r, k, size in columns]
    ends = positions(counts).tolist()
    return [found[first:last] for first, last in itertools.pairwise(ends)]


def _objects(table: _Table, count: int) -> list[list[tuple[str, bool]]]:
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


def _spent(table: _Table) -> tuple[Spent, ...]:
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
