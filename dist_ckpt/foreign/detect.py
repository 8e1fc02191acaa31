"""Which program wrote what is in a directory, and opening it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    UsageError,
)
from dist_ckpt.foreign import torch_files
from dist_ckpt.foreign.dcp_files import METADATA, is_stock, read_stock, tell_unreadable
from dist_ckpt.foreign.leaves import ForeignLeaf
from dist_ckpt.foreign.names import sort_into_parts
from dist_ckpt.foreign.source import Chunk, ForeignSource, Found, Runs
from dist_ckpt.foreign.torch_files import TorchTensor
from dist_ckpt.foreign.torch_leaves import torch_leaves
from dist_ckpt.format.files import DTYPES, ShardHeader, header_nbytes, parse_header
from dist_ckpt.format.index import Box, TensorEntry
from dist_ckpt.state.encoding import Unreadable
from dist_ckpt.storage.base import Store, has, is_key, read_all

_SAFETENSORS_SUFFIX = ".safetensors"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FILE_SUFFIXES = (_SAFETENSORS_SUFFIX, *_TORCH_SUFFIXES, ".pkl")
"""How a single file is called that is a checkpoint by itself."""

_ADAPTER, _ADAPTER_CONFIG = "adapter_model.", "adapter_config.json"
_WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_SAFETENSORS_INDEX_SUFFIX = ".safetensors.index.json"
_TORCH_INDEX_SUFFIX = ".bin.index.json"

_Reader: TypeAlias = Callable[[Store, Sequence[str]], Found]


def open_foreign(
    store: Store, file: str | None = None, *, whole: Collection[str] = ()
) -> ForeignSource | None:
    """Open what another program wrote in `store`, or in one file of it.

    Args:
        store: a directory.
        file: the key of the file that is meant; None to look what there is: a stock DCP
            checkpoint, then safetensors, then `torch.save` files, each with an index of several
            files before a single one.
        whole: see `dist_ckpt.foreign.names.sort_into_parts`.

    Returns:
        The checkpoint; None if there is nothing of all this.

    Raises:
        IntegrityError: what is there is malformed or incomplete.
        IncompatibleError: it holds something that cannot be read.
        NotFound: `file` is not there.
        UsageError: there are several, and nothing says which one is meant.
    """
    as_torch = partial(_read_torch, whole=whole)
    if file is not None:
        return ForeignSource.of(store, _one_file(store, file, as_torch))
    if is_stock(store):
        return ForeignSource.of(store, read_stock(store, whole=whole))
    names = sorted(name for name in store.list_children() if not name.endswith("/"))
    kinds: list[tuple[str, tuple[str, ...], _Reader]] = [
        (_SAFETENSORS_INDEX_SUFFIX, (_SAFETENSORS_SUFFIX,), _read_safetensors),
        (_TORCH_INDEX_SUFFIX, _TORCH_SUFFIXES, as_torch),
    ]
    for index_suffix, suffixes, each in kinds:
        indexes = [name for name in names if name.endswith(index_suffix)]
        found = [name for name in names if name.endswith(suffixes)]
        # An index says which files belong together; without one there can be but one.
        if indexes:
            _one(indexes, store)
            return ForeignSource.of(store, _indexed(store, indexes[0], each))
        if found:
            # A trainer leaves its arguments and its optimizer beside them, in files of one suffix.
            only = _one(_weights(found), store)
            return ForeignSource.of(store, _one_file(store, only, as_torch))
    return None


def _one_file(store: Store, file: str, as_torch: _Reader) -> Found:
    reader: _Reader = _read_safetensors if file.endswith(_SAFETENSORS_SUFFIX) else as_torch
    found = reader(store, [file])
    return replace(found, is_adapter=file.startswith(_ADAPTER) or has(store, _ADAPTER_CONFIG))


def _weights(names: Sequence[str]) -> Sequence[str]:
    """Return those of `names` that are weights by their names, all of them where none is.

    A trainer keeps the state of its optimizer and its arguments beside the weights.
    """
    return [name for name in names if name.partition(".")[0] in _WEIGHTS] or names


def named_like_one(store: Store) -> str | None:
    """Return what in the folder `store` is called like a checkpoint of others; None for nothing.

    Nothing is opened: for whoever only says that something is there.
    """
    names = store.list_children()
    found = (name for name in names if name == METADATA or name.endswith(FILE_SUFFIXES))
    return next(found, None)


def looked_for() -> str:
    """Return what `open_foreign` knows, for the message when nothing of it is there."""
    return (
        f"no step directories of dist_ckpt, no {METADATA} of torch.distributed.checkpoint, no "
        f"*{_SAFETENSORS_SUFFIX} and none of "
        f"{', '.join('*' + suffix for suffix in _TORCH_SUFFIXES)}"
    )


def _indexed(store: Store, index: str, reader: _Reader) -> Found:
    """Describe the files that an index names, and check that each has what the index says."""
    # The files are told by the index alone: others of this suffix may lie there, too.
    weight_map = _read_weight_map(store, index)
    keys = sorted(set(weight_map.values()))
    try:
        found = reader(store, keys)
    except NotFound as error:
        # Named, and not there: damage, and not that there is no checkpoint.
        raise IntegrityError(
            f"{index} in {store.url} names a file that is not there: {error.message}",
            kind=ErrorKind.MISSING_FILE,
        ) from error
    # This way alone: files that have more than the index names do no harm.
    absent = sorted(set(weight_map) - {tensor.name for tensor in found.tensors})
    if absent:
        raise IntegrityError(
            f"{index} in {store.url} names {len(absent)} tensors that its files have not, such as "
            f"{absent[0]!r}",
            kind=ErrorKind.COVERAGE,
        )
    return found


def _one(names: Sequence[str], store: Store) -> str:
    if len(names) > 1:
        # Nothing is damaged: which one is meant only the caller knows.
        raise UsageError(
            f"{store.url} has {', '.join(names[:4])}{' ...' if names[4:] else ''} and nothing that "
            "says which of them belong together: name one file"
        )
    return names[0]


# Files of `torch.save`.


def _read_torch(store: Store, keys: Sequence[str], *, whole: Collection[str] = ()) -> Found:
    """Describe the tensors and values in `torch.save` files; nothing in them is executed.

    A value that only a program which executes pickles could read is told once, and is an error
    only for whoever wants it.

    Raises:
        IntegrityError: a file is malformed, or holds nothing but such values.
        IncompatibleError: a tensor does not fill one run of bytes of its file.
    """
    entries: list[ForeignLeaf] = []
    unreadable: list[str] = []
    found: dict[int, tuple[int, TorchTensor]] = {}
    for file, key in enumerate(keys):
        for path, leaf in torch_leaves(store, key):
            if isinstance(leaf, TorchTensor):
                found[len(entries)] = file, leaf
                entries.append(ForeignLeaf(path, leaf.dtype, leaf.shape))
                continue
            if isinstance(leaf, Unreadable):
                unreadable.append(leaf.reason)
            entries.append(ForeignLeaf(path, None, (), leaf))
    where = f"{', '.join(keys)} in {store.url}"
    if unreadable and len(unreadable) == len(entries):
        # A whole module, say: what cannot be read is all that there is.
        said = f"{unreadable[0]}, and there is nothing else; {_way_to_objects(unreadable)}"
        raise torch_files.malformed(where, said)
    tell_unreadable(store.url, where, unreadable, way=_way_to_objects(unreadable))
    placed = sort_into_parts(entries, where, whole=whole)
    chunks: list[Chunk] = []
    runs = Runs(len(keys))
    # By the number of the entry on both sides: whatever else there is, nothing is shifted.
    for number, entry in enumerate(placed.tensors):
        file, tensor = found[entry]
        box = Box((0,) * len(tensor.shape), tensor.shape)
        chunks.append((number, *runs.place(tensor, file), box))
    return Found(
        "torch.save",
        keys,
        [store.size(key) for key in keys],
        list(placed.tensors.values()),
        chunks,
        placed.objects,
        permuted=runs.permuted,
    )


# Files of safetensors, and the index of several.


# Of the dtypes that share a code only the one that the code is named after.
_DTYPE_OF = {code: name for name, (code, _) in DTYPES.items() if code != "U8"} | {"U8": "uint8"}
_INDEX_LIMIT_BYTES = 1 << 28


@decodable
class _WeightMap(msgspec.Struct):
    """The part of a hub index that counts: which file a tensor is in."""

    weight_map: dict[str, str]


def _read_weight_map(store: Store, key: str) -> dict[str, str]:
    """Return which file, beside the index under `key`, holds which tensor.

    Raises:
        IntegrityError: it is no such index, or names a file that is not beside it.
    """
    try:
        data = read_all(store, key, limit_bytes=_INDEX_LIMIT_BYTES)
        found = msgspec.json.decode(data, type=_WeightMap).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{key} in {store.url} is no index of weight files: {error}", kind=ErrorKind.MALFORMED
        ) from error
    for name in found.values():
        # What is read never lies outside of what the user pointed at.
        # Beside and not below: a link of a folder could lead anywhere.
        if "/" in name or not is_key(name):
            raise IntegrityError(
                f"{key} in {store.url} names the file {name!r}, which is not beside it",
                kind=ErrorKind.MALFORMED,
            )
    return found


def _read_safetensors(store: Store, keys: Sequence[str], *, part: str = "model") -> Found:
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
        # Longer than nine bytes, so the ninth is the first of the JSON.
        if count == len(first) < length and first[8:] != b"{":
            raise IntegrityError("its header is no JSON object", kind=ErrorKind.MALFORMED)
        data = bytearray(length)
        count = store.read_into(key, 0, memoryview(data))
        return parse_header(bytes(data[:count]), nbytes, ours=False)
    except IntegrityError as error:
        raise IntegrityError(
            f"{key} in {store.url} is no whole safetensors file: {error.message}", kind=error.kind
        ) from error


def _way_to_objects(reasons: Sequence[str]) -> str:
    """Say how to have what stands in a file of `torch.save` as an object of a class."""
    # So the classes of a TorchScript archive are called.
    if any("__torch__." in reason for reason in reasons):
        return "it is of TorchScript: load it by torch.jit.load, save its state_dict()"
    return (
        "if you trust it, load it by torch.load(weights_only=False), and save what it holds as "
        "plain values, of a module its state_dict()"
    )
