"""Shard files: valid safetensors files whose data start on a page boundary."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format.digest import cut_blocks
from dist_ckpt.format.limits import INT64_MAX

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
    offsets = tuple(len(header) + start for start in starts)
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
    nbytes = math.prod(wire.shape) * _CODE_BYTES[wire.dtype]
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
