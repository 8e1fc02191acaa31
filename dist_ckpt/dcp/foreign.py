"""Checkpoints of stock `torch.distributed.checkpoint`: `.metadata` and `.distcp` files.

The metadata is a pickle, read by an unpickler that admits DCP's own metadata classes and nothing
else. Each chunk is a `torch.save` archive inside of a `.distcp` file; where its raw bytes lie is
looked up once, and from then on such a checkpoint is read as one of ours: by ranges, at any layout.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - only to be restricted: see _Unpickler
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as stock

from dist_ckpt.dcp.foreign_names import Entry, Placed, Unreadable, place
from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    describe,
)
from dist_ckpt.format.boxes import Box, volume
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.pickle_guard import check_pickle
from dist_ckpt.repository import torch_files
from dist_ckpt.repository.foreign import Chunk, Found, Runs
from dist_ckpt.repository.torch_files import StoredTensor
from dist_ckpt.state.layout import dtype_name
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.storage.parallel import in_parallel

METADATA = ".metadata"

_METADATA_LIMIT_BYTES = 1 << 32
_THREADS = 16

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# By pairs that are spelled out: a module as a whole would admit whatever it imports.
_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(stock, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
        if hasattr(stock, name)
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,  # noqa: SLF001 - it is in every .metadata
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    ("collections", "OrderedDict"): dict,
    # Where it was saved, which nobody asks.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
}


@dataclass(frozen=True, slots=True)
class _Blob:
    """One archive inside of a file."""

    file: int
    start: int
    nbytes: int


def read_stock(store: Store) -> Found:
    """Describe the stock checkpoint in `store`; nothing in it is executed.

    Raises:
        NotFound: there is none.
        IntegrityError: its metadata is malformed or refers to anything but DCP's own classes (of
            which nothing is executed), or does not fit its files.
        IncompatibleError: it holds something that cannot be read by ranges.
    """
    try:
        return _read_stock(store)
    except CheckpointError:
        raise
    # Metadata of the right classes, with whatever in their fields.
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _broken(
            f"{METADATA} in {store.url}", f"it cannot be DCP's metadata: {describe(error)}"
        ) from error


def _read_stock(store: Store) -> Found:
    found = _read_metadata(store)
    where = f"the stock checkpoint in {store.url}"
    storage: dict[tuple[str, tuple[int, ...]], Any] = {
        (index.fqn, tuple(index.offset or ())): info
        for index, info in (found.storage_data or {}).items()
    }
    keys = sorted({str(info.relative_path) for info in storage.values()})
    numbers = {key: number for number, key in enumerate(keys)}
    reading = _Reading(store, keys, where)

    def blob(fqn: str, offsets: Sequence[int]) -> _Blob:
        # The chunk of a tensor that is not sharded may be kept without offsets.
        info = storage.get((fqn, tuple(offsets))) or storage.get((fqn, ()))
        if info is None:
            raise _broken(where, f"{fqn!r} at {list(offsets)} is in no file")
        if getattr(info, "transform_descriptors", None):
            raise IncompatibleError(f"{where}: {fqn!r} was compressed or transformed by its writer")
        return _Blob(numbers[str(info.relative_path)], int(info.offset), int(info.length))

    paths = found.planner_data if isinstance(found.planner_data, Mapping) else {}
    entries: list[Entry] = []
    chunks: dict[str, list[tuple[Box, _Blob]]] = {}
    for fqn, kept in found.state_dict_metadata.items():
        path = tuple(paths.get(fqn, (fqn,)))
        if isinstance(kept, stock.TensorStorageMetadata):
            entry = Entry(path, dtype_name(kept.properties.dtype), tuple(kept.size))
            boxes = [Box(tuple(c.offsets), tuple(c.sizes)) for c in kept.chunks]
            found_at = [(box, blob(fqn, box.offsets)) for box in boxes]
            chunks[fqn] = _with_elements(entry.shape, found_at)
        else:
            entry = Entry(path, None, (), reading.value(fqn, blob(fqn, ())))
        entries.append(entry)
    placed = place(entries, where)
    return _described(reading, placed, list(chunks.values()))


def _with_elements(
    shape: tuple[int, ...], chunks: Sequence[tuple[Box, _Blob]]
) -> list[tuple[Box, _Blob]]:
    """Leave out the chunks of ranks that had nothing of a tensor.

    Stock lists them, where the tensor ends or where another chunk begins. Of a tensor without
    elements there is one chunk, of all of it, however ranks cut their nothing.
    """
    if not all(shape):
        return [(Box((0,) * len(shape), shape), blob) for _, blob in chunks[:1]]
    return [(box, blob) for box, blob in chunks if volume(box)]


class _Reading:
    """Small reads from the files of one checkpoint."""

    def __init__(self, store: Store, keys: Sequence[str], where: str) -> None:
        self.store = store
        self.keys = keys
        self.where = where
        for key in keys:
            # What is read never lies outside of what the user pointed at.
            if key.startswith("/") or not set(key.split("/")).isdisjoint({"", ".", ".."}):
                raise _broken(where, f"{key!r} is no file of it")
        try:
            self.sizes = [store.size(key) for key in keys]
        except NotFound as error:
            raise IntegrityError(
                f"{where} lacks a file: {error.message}", kind=ErrorKind.MISSING_FILE
            ) from error

    def value(self, fqn: str, blob: _Blob) -> Any:
        """Return a Python value, or what stands for one that cannot be read."""
        data = bytearray(blob.nbytes)
        self.store.read_into(self.keys[blob.file], blob.start, memoryview(data))
        try:
            # Tensors and plain values only: torch's own restricted unpickler.
            return torch.load(  # noqa: TID251
                io.BytesIO(data), map_location="cpu", weights_only=True
            )
        except Exception as error:  # whatever a foreign pickle leads to
            # Of torch's message only the fault: the rest is how to execute the pickle after all.
            fault = describe(error).rpartition("WeightsUnpickler error: ")[2].strip()
            return Unreadable(f"{fqn}: {fault.partition('. ')[0].splitlines()[0]}")

    def tensors(self, blobs: Sequence[_Blob]) -> list[StoredTensor]:
        """Return where the bytes of the tensor in each of `blobs` lie."""
        found: dict[int, StoredTensor] = {}

        def look(numbered: tuple[int, _Blob]) -> None:
            number, blob = numbered
            key = self.keys[blob.file]
            tensor = torch_files.describe(self.store, key, start=blob.start, nbytes=blob.nbytes)
            if not isinstance(tensor, StoredTensor):
                raise _broken(self.where, f"{key} has something else where a tensor should be")
            found[number] = tensor

        in_parallel(look, enumerate(blobs), threads=min(_THREADS, len(blobs)))
        return [found[number] for number in range(len(blobs))]


def _described(
    reading: _Reading, placed: Placed, chunks: Sequence[Sequence[tuple[Box, _Blob]]]
) -> Found:
    rows: list[Chunk] = []
    runs = Runs(len(reading.keys))
    flat = [(n, box, blob) for n, each in enumerate(chunks) for box, blob in each]
    stored = reading.tensors([blob for _, _, blob in flat])
    for (number, box, blob), tensor in zip(flat, stored, strict=True):
        entry: TensorEntry = placed.tensors[number]
        alike = tensor.shape == box.sizes or (0 in tensor.shape and not volume(box))
        if tensor.dtype != entry.dtype or not alike:
            raise _broken(
                reading.where,
                f"{entry.name!r} at {list(box.offsets)} should be {entry.dtype}{list(box.sizes)} "
                f"and is {tensor.dtype}{list(tensor.shape)}",
            )
        rows.append((number, *runs.place(tensor, blob.file), box))
    return Found(
        "stock DCP",
        reading.keys,
        reading.sizes,
        placed.tensors,
        rows,
        placed.objects,
        permuted=runs.permuted,
    )


def _read_metadata(store: Store) -> Any:
    data = read_all(store, METADATA, limit_bytes=_METADATA_LIMIT_BYTES)
    try:
        check_pickle(data)
        found = _Unpickler(io.BytesIO(data)).load()
    # What a pickle stream makes of its operands is chosen by whoever wrote it.
    except Exception as error:
        raise _broken(
            f"{METADATA} in {store.url}", f"it cannot be read as DCP's metadata: {describe(error)}"
        ) from error
    kept = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(found, stock.Metadata) or not all(isinstance(each, dict) for each in kept):
        raise _broken(f"{METADATA} in {store.url}", "it holds something else than DCP's metadata")
    return found


class _Unpickler(pickle.Unpickler):
    """Admits what DCP's metadata is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not admitted")

    def persistent_load(self, saved: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def is_stock(store: Store) -> bool:
    """Tell whether `store` holds a stock checkpoint."""
    try:
        store.size(METADATA)
    except NotFound:
        return False
    return True


def _broken(where: str, problem: str) -> IntegrityError:
    return IntegrityError(f"{where}: {problem}", kind=ErrorKind.MALFORMED)
