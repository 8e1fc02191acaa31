"""Safetensors in the layout of the Hugging Face hub: one file, or several and an index of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.foreign.source import Chunk, Found
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.shard import DTYPES, ShardHeader, header_nbytes, parse_header
from dist_ckpt.storage.base import Store, is_key, read_all

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"

# Of the dtypes that share a code only the one that the code is named after.
_DTYPE_OF = {code: name for name, (code, _) in DTYPES.items() if code != "U8"} | {"U8": "uint8"}
_INDEX_LIMIT_BYTES = 1 << 28


@decodable
class WeightMap(msgspec.Struct):
    """The part of a hub index that counts: which file a tensor is in."""

    weight_map: dict[str, str]


def read_weight_map(store: Store, key: str) -> dict[str, str]:
    """Return which file, beside the index under `key`, holds which tensor.

    Raises:
        IntegrityError: it is no such index, or names a file that is not beside it.
    """
    try:
        data = read_all(store, key, limit_bytes=_INDEX_LIMIT_BYTES)
        found = msgspec.json.decode(data, type=WeightMap).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{key} in {store.url} is no index of weight files: {error}", kind=ErrorKind.MALFORMED
        ) from error
    for name in found.values():
        # What is read never lies outside of what the user pointed at.
        if "/" in name or not is_key(name):
            raise IntegrityError(
                f"{key} in {store.url} names the file {name!r}, which is not beside it",
                kind=ErrorKind.MALFORMED,
            )
    return found


def read_safetensors(store: Store, keys: Sequence[str], *, part: str = "model") -> Found:
    """Describe the tensors in safetensors files.

    Args:
        store: where they are.
        keys: of the files.
        part: what the tensors are taken for.

    Raises:
        IntegrityError: a header is malformed, a name is in two files, or a file is cut short.
        IncompatibleError: a tensor has a dtype that torch cannot hold.
    """
    tensors: list[TensorEntry] = []
    chunks: list[Chunk] = []
    sizes: list[int] = []
    for number, key in enumerate(keys):
        sizes.append(store.size(key))
        header = _header(store, key, sizes[-1])
        numbers: dict[str, int] = {}
        for entry in header.entries:
            if entry.code not in _DTYPE_OF:
                raise IncompatibleError(
                    f"tensor {entry.name!r} of {key} in {store.url} has the dtype {entry.code}, "
                    "which is not supported"
                )
            whole = Box((0,) * len(entry.shape), entry.shape)
            numbers[entry.name] = len(tensors)
            chunks.append((len(tensors), number, entry.offset, whole))
            tensors.append(TensorEntry(part, entry.name, _DTYPE_OF[entry.code], entry.shape))
        # What `save_model` left out of the file, since another name has its memory.
        for name, other in header.metadata.items():
            if name not in numbers and other in numbers:
                same = tensors[numbers[other]]
                chunks.append((len(tensors), *chunks[numbers[other]][1:]))
                tensors.append(TensorEntry(part, name, same.dtype, same.shape))
    return Found("safetensors", keys, sizes, tensors, chunks)


def _header(store: Store, key: str, nbytes: int) -> ShardHeader:
    prefix = bytearray(min(8, nbytes))
    store.read_into(key, 0, memoryview(prefix))
    try:
        length = header_nbytes(bytes(prefix), nbytes)
        # One byte of it before all of it: a file may claim a long header that is one hole.
        first = bytearray(9)
        count = store.read_into(key, 0, memoryview(first))
        if count == len(first) < length and first[8:] != b"{":
            raise IntegrityError("its header is no JSON object", kind=ErrorKind.MALFORMED)
        data = bytearray(length)
        count = store.read_into(key, 0, memoryview(data))
        return parse_header(bytes(data[:count]), nbytes, ours=False)
    except IntegrityError as error:
        raise IntegrityError(
            f"{key} in {store.url} is no whole safetensors file: {error.message}", kind=error.kind
        ) from error
