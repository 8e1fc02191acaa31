"""Files of a checkpoint: shards, which are valid safetensors files, and digests of their blocks.

The data of a shard start on a page boundary. Digests are xxh3-64, one for each block of a file, and
one of those for the file. They find damage, not forgery: whoever can write to the store can write
matching digests too.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format.names import INT64_MAX

Buffer = bytes | bytearray | memoryview

# In format 1 that of all blocks of a file but its last, in format 2 the most that one may have.
BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8

SMALL_BYTES = 4096
"""Chunks of fewer bytes share a block, and no block inside a larger one has fewer."""

# A reader of a part of a chunk reads up to two blocks in vain, of at least so many.
_BLOCKS_OF_A_CHUNK = 32


def block_count(nbytes: int) -> int:
    """Return how many blocks a file of `nbytes` bytes has; the last one may be short."""
    return -(-nbytes // BLOCK_BYTES)


def cut_blocks(head_bytes: int, chunks: Iterable[int]) -> list[int]:
    """Return the lengths of the blocks of a file, so that a part of a chunk is read by itself.

    Args:
        head_bytes: what comes before the first chunk.
        chunks: bytes of each chunk, in the order in which they follow one another.
    """
    lengths = _pieces(head_bytes, BLOCK_BYTES)
    together = 0
    for nbytes in chunks:
        if nbytes < SMALL_BYTES:
            together += nbytes
        # Small chunks share a block until they have enough bytes or a large one begins its own.
        if together and (nbytes >= SMALL_BYTES or together >= SMALL_BYTES):
            lengths.append(together)
            together = 0
        if nbytes >= SMALL_BYTES:
            # The largest power of two that is at most a 32nd of the chunk. Digests then take a
            # 512th of what is stored, at most: 8 bytes for each 4,096.
            power = (nbytes // _BLOCKS_OF_A_CHUNK).bit_length() - 1
            lengths += _pieces(nbytes, min(max(1 << power, SMALL_BYTES), BLOCK_BYTES))
    return [*lengths, together] if together else lengths


def _pieces(nbytes: int, most: int) -> list[int]:
    whole, rest = divmod(nbytes, most)
    return [most] * whole + [rest] * bool(rest)


def block_digests(*buffers: Buffer) -> bytes:
    """Return the digest of each 1 MiB of `buffers`, 8 bytes big-endian each, b"" for no bytes.

    The digests of a file may be computed in pieces and joined, as long as every piece but the
    last is a whole number of blocks.

    Args:
        buffers: the bytes, one buffer after another, C-contiguous, of any element type.
    """
    # Not `len`, which counts items of whatever type a buffer has.
    nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
    return digest_blocks(_pieces(nbytes, BLOCK_BYTES), *buffers)


def digest_blocks(lengths: Iterable[int], *buffers: Buffer) -> bytes:
    """Return the digests of blocks of `lengths`, 8 bytes big-endian each.

    Args:
        lengths: none is 0, and all together they are the bytes of `buffers`.
        buffers: the bytes, one buffer after another, C-contiguous, of any element type.
    """
    digests: list[bytes] = []
    following = iter(lengths)
    block, room = None, 0
    for buffer in buffers:
        view, start = memoryview(buffer).cast("B"), 0
        while start < len(view):
            # A block that lies in one buffer, as nearly all do, is one call and needs no state.
            fresh = not room
            room = room or next(following)
            piece = view[start : start + room]
            start += len(piece)
            room -= len(piece)
            if fresh and not room:
                # Big-endian, which is xxHash's canonical form and that of the format.
                digests.append(xxhash.xxh3_64_digest(piece))
                continue
            block = block or xxhash.xxh3_64()
            block.update(piece)
            if not room:
                digests.append(block.digest())
                block = None
    return b"".join(digests)


def file_digest(digests: bytes) -> str:
    """Return the digest of a file, 16 hex digits, from its joined block digests.

    Raises:
        UsageError: `digests` is not a whole number of block digests.
    """
    if len(digests) % DIGEST_BYTES:
        raise UsageError(
            f"{len(digests)} bytes of block digests: pass what block_digests returned, joined"
        )
    return bytes_digest(digests)


def bytes_digest(data: Buffer) -> str:
    """Return the digest of `data` as one piece, 16 hex digits: for the index and for objects."""
    return xxhash.xxh3_64_hexdigest(data)


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
            # A file without bytes has one edge and so no block.
            grid = np.arange(0, self.nbytes, BLOCK_BYTES, dtype=np.int64)
            return np.append(grid, self.nbytes)
        lengths = np.frombuffer(self.lengths, "<u4")
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    def blocks_in(self, start: int, stop: int) -> tuple[int, int]:
        """Return the number of the block that begins at `start`, and that of the one at `stop`.

        Raises:
            UsageError: none does.
        """
        # Only `stop` can lie behind the last edge, as `start` is not behind it.
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
        # To the right: where a block begins at `start` it is that one and not the one before.
        first = int(np.searchsorted(self.edges, start, side="right")) - 1
        return int(self.edges[first]), int(self.edges[np.searchsorted(self.edges, stop)])

    def spans(self, most_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the file in pieces of whole blocks, of at most so many bytes or of one block."""
        first, edges = 0, self.edges
        while first + 1 < len(edges):
            last = int(np.searchsorted(edges, edges[first] + most_bytes, side="right")) - 1
            # A block of more bytes goes alone, since less than the whole of it cannot be compared.
            last = max(last, first + 1)
            yield int(edges[first]), int(edges[last])
            first = last


# Shard files: where each chunk of one lies, and what its header says.


# A page: where the data begin on one, they can be read past the page cache into place.
ALIGN_BYTES = 4096
HEADER_LIMIT_BYTES = 100_000_000
"""The safetensors library refuses a longer JSON header."""

DTYPES: dict[str, tuple[str, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    # No code that safetensors.torch can load: the bytes are stored, one more dimension of them.
    "float8_e8m0fnu": ("U8", 1),
    "float4_e2m1fn_x2": ("U8", 1),
    "complex32": ("U8", 4),
    "complex128": ("U8", 16),
}
"""torch dtype without "torch." to (safetensors code, bytes per element)."""

# Several types of torch are stored as U8, with other sizes: as a code it is one byte.
_CODE_BYTES = {code: nbytes for code, nbytes in DTYPES.values() if code != "U8"} | {"U8": 1}
_LENGTH = struct.Struct("<Q")
# The 64 dimensions of torch and the one that dtypes without a code add.
_MAX_STORED_NDIM = 65
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One chunk to be laid out: its name in the file, its torch dtype, its shape in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where everything of a shard file goes.

    Attributes:
        header: the first bytes of the file, length prefix and padding included.
        offsets: for each entry, in the order given, its absolute byte offset in the file.
        nbytes: size of the file, header and data.
        blocks: lengths of the blocks that have a digest each.
    """

    header: bytes
    offsets: tuple[int, ...]
    nbytes: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One entry as a header describes it: safetensors code, stored shape, place in the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a header says: entries in file order, free metadata, bytes before the data."""

    entries: tuple[StoredEntry, ...]
    metadata: dict[str, str]
    nbytes: int


@decodable
class _WireEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def itemsize(dtype: str) -> int:
    """Return the bytes per element of `dtype`.

    Raises:
        UsageError: the dtype is not in `DTYPES`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"tensors of dtype {dtype!r} cannot be stored: use one of {list(DTYPES)}")
    return DTYPES[dtype][1]


def entry_nbytes(entry: ShardEntry) -> int:
    """Return the bytes that `entry` takes in a file.

    Raises:
        UsageError: the dtype is not in `DTYPES`.
    """
    return math.prod(entry.shape) * itemsize(entry.dtype)


def layout(entries: Sequence[ShardEntry], metadata: Mapping[str, str]) -> ShardLayout:
    """Place `entries` in one shard file.

    Args:
        entries: the chunks, in any order, each name once.
        metadata: free text of the file, `__metadata__` of its header.

    Raises:
        UsageError: two entries of one name, a reserved name, an unknown dtype, or more entries
            than a safetensors header can hold.
    """
    _check_names(entries)
    sizes = [entry_nbytes(entry) for entry in entries]
    # Widest items first: from an aligned start, each entry then lies on a multiple of its item.
    order = sorted(
        range(len(entries)), key=lambda i: (-itemsize(entries[i].dtype), entries[i].name)
    )
    starts = [0] * len(entries)
    position = 0
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for i in order:
        starts[i] = position
        position += sizes[i]
        code, shape = _stored(entries[i])
        fields[entries[i].name] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": (starts[i], position),
        }
    header = _frame(_encode(fields))
    # From the start of the file, so that no reader has to look at the header first.
    offsets = tuple(len(header) + start for start in starts)
    # In the order of the file, which is not that in which the entries were given.
    blocks = cut_blocks(len(header), (sizes[i] for i in order))
    return ShardLayout(header, offsets, len(header) + position, tuple(blocks))


def header_nbytes(prefix: bytes, file_nbytes: int) -> int:
    """Return where the data of a shard file start, from its first 8 bytes.

    Raises:
        IntegrityError: fewer than 8 bytes, or a header that the file cannot hold.
    """
    if len(prefix) < _LENGTH.size or file_nbytes < _LENGTH.size:
        raise IntegrityError(
            f"shard of {file_nbytes} bytes ends inside its length prefix: it was cut short",
            kind=ErrorKind.TRUNCATED,
        )
    # Bounded before a byte of the header is asked for: whoever reads it takes memory for so much.
    length = int(_LENGTH.unpack_from(prefix)[0])
    if length > min(file_nbytes - _LENGTH.size, HEADER_LIMIT_BYTES):
        raise IntegrityError(
            f"shard claims a header of {length} bytes in a file of {file_nbytes} bytes",
            kind=ErrorKind.MALFORMED,
        )
    return _LENGTH.size + length


def parse_header(data: bytes, file_nbytes: int, *, ours: bool = True) -> ShardHeader:
    """Decode the header of a shard file, trusting nothing in it.

    Args:
        data: the first bytes of the file, at least `header_nbytes` of them.
        file_nbytes: size of the whole file.
        ours: whether the rules of the format hold too: data on a page boundary, entries in the
            order of their bytes. Files of other programs are any safetensors.

    Raises:
        IntegrityError: not safetensors, not aligned, or entries that do not fill the data
            exactly, in order, without holes.
    """
    nbytes = header_nbytes(data, file_nbytes)
    if len(data) < nbytes:
        raise IntegrityError(
            f"{len(data)} bytes of a shard header of {nbytes}: it was cut short",
            kind=ErrorKind.TRUNCATED,
        )
    if ours and nbytes % ALIGN_BYTES:
        raise _malformed(f"its data start at byte {nbytes}, not a multiple of {ALIGN_BYTES}")
    fields = _decode(data[_LENGTH.size : nbytes], dict[str, msgspec.Raw])
    metadata = _decode(fields.pop("__metadata__", msgspec.Raw(b"{}")), dict[str, str])
    entries: list[StoredEntry] = []
    position = 0
    wires = [(name, _decode(field, _WireEntry)) for name, field in fields.items()]
    if not ours:
        # Empty ones before those that begin at the same byte.
        wires.sort(key=lambda entry: entry[1].data_offsets)
    for name, wire in wires:
        entry = _check_entry(name, wire, position, nbytes)
        position += entry.nbytes
        entries.append(entry)
    # The last entry ends with the file: what is missing, or follows, was never described.
    if nbytes + position != file_nbytes:
        raise IntegrityError(
            f"shard describes {nbytes + position} bytes but the file has {file_nbytes}",
            kind=ErrorKind.TRUNCATED,
        )
    return ShardHeader(tuple(entries), metadata, nbytes)


def _check_names(entries: Sequence[ShardEntry]) -> None:
    names = {entry.name for entry in entries}
    if len(names) != len(entries):
        raise UsageError("two entries of one shard have the same name: names must be unique")
    if "__metadata__" in names:
        raise UsageError("a shard entry cannot be named '__metadata__': rename the tensor")


def _stored(entry: ShardEntry) -> tuple[str, tuple[int, ...]]:
    code, nbytes = DTYPES[entry.dtype]
    if code == "U8" and entry.dtype != "uint8":
        return code, (*entry.shape, nbytes)
    return code, entry.shape


def _encode(fields: dict[str, object]) -> bytes:
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError as error:
        raise UsageError(f"a shard holds text that is not valid Unicode: {error}") from error


def _frame(text: bytes) -> bytes:
    # Spaces behind the JSON are still JSON, so any reader of safetensors takes a padded header.
    padding = -(_LENGTH.size + len(text)) % ALIGN_BYTES
    if len(text) + padding > HEADER_LIMIT_BYTES:
        raise UsageError(
            f"a shard header of {len(text)} bytes is over {HEADER_LIMIT_BYTES}: "
            "split the part into several parts"
        )
    return _LENGTH.pack(len(text) + padding) + text + b" " * padding


def _decode(text: bytes | msgspec.Raw, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    # RecursionError: how deep the JSON goes is chosen by whoever wrote the bytes.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _malformed(f"its header is not what safetensors describes: {error}") from error


def _check_entry(name: str, wire: _WireEntry, position: int, base: int) -> StoredEntry:
    begin, end = wire.data_offsets
    if wire.dtype not in _CODE_BYTES:
        raise _malformed(f"entry {name!r} has the unknown dtype {wire.dtype!r}")
    # Bounded before it is multiplied: a header can hold millions of dimensions.
    if len(wire.shape) > _MAX_STORED_NDIM or not all(0 <= n <= INT64_MAX for n in wire.shape):
        raise _malformed(f"entry {name!r} has an impossible shape")
    # In Python integers, as 65 sizes of 63 bits each have a product that nothing else holds.
    nbytes = math.prod(wire.shape) * _CODE_BYTES[wire.dtype]
    # One comparison for order, holes, overlaps and a shape of other bytes.
    if (begin, end) != (position, position + nbytes):
        raise _malformed(
            f"entry {name!r} lies at bytes {begin} to {end} of the data, "
            f"where its neighbours and its shape put it at {position} to {position + nbytes}"
        )
    return StoredEntry(name, wire.dtype, tuple(wire.shape), base + begin, nbytes)


def _malformed(problem: str) -> IntegrityError:
    return IntegrityError(
        f"not a shard file: {problem}. Use another checkpoint", kind=ErrorKind.MALFORMED
    )
