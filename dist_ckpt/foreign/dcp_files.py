"""Checkpoints of stock `torch.distributed.checkpoint`: `.metadata` and `.distcp` files.

The metadata is a pickle, of which nothing is executed or built (`_parse_metadata`). Each chunk is
a `torch.save` archive inside of a `.distcp` file; where its raw bytes lie is looked up once, and
from then on such a checkpoint is read as one of ours: by ranges, at any layout.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import torch

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    describe,
)
from dist_ckpt.events import tell_once
from dist_ckpt.foreign import torch_files
from dist_ckpt.foreign.leaves import ForeignLeaf
from dist_ckpt.foreign.names import Placed, sort_into_parts
from dist_ckpt.foreign.source import Chunk, Found, Runs
from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown
from dist_ckpt.foreign.torch_files import DtypeName, TorchTensor
from dist_ckpt.foreign.torch_leaves import torch_leaves
from dist_ckpt.foreign.unpickle import unpickle
from dist_ckpt.format.index import Box, TensorEntry, volume
from dist_ckpt.format.names import STEP_LIMIT, count_elements
from dist_ckpt.state.encoding import Inline, Unreadable
from dist_ckpt.state.layout import dtype_name, dtype_of
from dist_ckpt.storage.base import Store, has, is_key, read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.threads import in_parallel

METADATA = ".metadata"

# What Megatron-Core and Lightning keep beside it, as files of `torch.save`.
_COMMON = "common.pt"
BESIDE = (_COMMON, "meta.pt")
_STEPS = (("iteration",), ("global_step",))
_MEGATRON_PARTS = ("optimizer",)

_SHOWN = 5

_METADATA_LIMIT_BYTES = 1 << 30
_THREADS = 16
# PROTO, with which pickles begin since protocol 2.
_PICKLE = b"\x80"
# How much larger than its archive a value may be: tensors in it that share their memory.
_MAX_EXPANSION = 4
_FREE_BYTES = 1 << 20
_INSTEAD = {
    ("torch", "Size"): Constructor(torch.Size),
    ("torch", "device"): Constructor(torch.device),
}


@dataclass(frozen=True, slots=True)
class _Blob:
    """One archive inside of a file."""

    file: int
    start: int
    nbytes: int


def read_stock(
    store: Store,
    *,
    place: Callable[[Sequence[ForeignLeaf], str], Placed] | None = None,
    whole: Collection[str] = (),
) -> Found:
    """Describe the stock checkpoint in `store`; nothing in it is executed.

    Args:
        store: its directory.
        place: gives the leaves their parts and names; None for those that a state has.
        whole: see `sort_into_parts`.

    Raises:
        NotFound: there is none.
        IntegrityError: its metadata is malformed or refers to anything but DCP's own classes (of
            which nothing is executed), or does not fit its files.
        IncompatibleError: it holds something that cannot be read by ranges.
    """
    found = _metadata(store)
    where = f"the stock checkpoint in {store.url}"
    beside = [key for key in BESIDE if place is None and has(store, key)]
    keys = sorted({each.key for each in found.places.values()} | set(beside))
    reading = _Reading(store, keys, where)
    leaves = _Leaves(reading)
    leaves.add_described(found, by_megatron=_COMMON in beside)
    for key in beside:
        leaves.add_beside(key)
    tell_unreadable(store.url, where, leaves.unreadable)
    if place is None:
        placed = sort_into_parts(leaves.entries, where, whole=whole)
    else:
        placed = place(leaves.entries, where)
    return replace(_described(reading, placed, leaves.chunks, leaves.whole), step=leaves.step)


def _metadata(store: Store) -> _StockMetadata:
    # The first byte is looked at before the others: what a file claims to hold may be a hole.
    data = read_all(store, METADATA, limit_bytes=_METADATA_LIMIT_BYTES, begins=_PICKLE)
    try:
        return _parse_metadata(data)
    except ValueError as error:
        problem = f"it cannot be read as DCP's metadata: {describe(error)}"
        raise _broken(f"{METADATA} in {store.url}", problem) from error


class _Leaves:
    """All tensors and values of one checkpoint.

    Attributes:
        entries: in the order in which they were added.
        chunks: the boxes of each tensor that is described, and their archives, by its number.
        whole: the file of each other tensor and where in it that is, by its number.
        unreadable: why a value cannot be read, for each such value.
        step: of the training, as far as it is known.
    """

    def __init__(self, reading: _Reading) -> None:
        self.entries: list[ForeignLeaf] = []
        self.chunks: dict[int, list[tuple[Box, _Blob]]] = {}
        self.whole: dict[int, tuple[int, TorchTensor]] = {}
        self.unreadable: list[str] = []
        self.step = 0
        self._reading = reading

    def add_described(self, found: _StockMetadata, *, by_megatron: bool) -> None:
        """Add what the metadata describe."""
        blobs = _Blobs(found, self._reading)
        # Values count, too: `chunks` goes by the place among all entries.
        for number, each in enumerate(found.entries):
            tensor = each.tensor
            path = _megatron_path(each.fqn) if by_megatron else each.path
            if tensor is None:
                self._add_value(path, self._reading.value(each.fqn, blobs.find(each.fqn, ())))
                continue
            self.entries.append(ForeignLeaf(path, tensor.dtype, tensor.shape))
            found_at = [(box, blobs.find(each.fqn, box.offsets)) for box in tensor.boxes]
            self.chunks[number] = _with_elements(tensor.shape, found_at)

    def add_beside(self, key: str) -> None:
        """Add what a file of `torch.save` beside them holds, unless it is there already."""
        known = {entry.path for entry in self.entries}
        for path, leaf in torch_leaves(self._reading.store, key):
            if path in known:
                continue
            if isinstance(leaf, TorchTensor):
                self.whole[len(self.entries)] = self._reading.keys.index(key), leaf
                self.entries.append(ForeignLeaf(path, leaf.dtype, leaf.shape))
                continue
            if path in _STEPS and type(leaf) is int and 0 <= leaf < STEP_LIMIT:
                self.step = leaf
            self._add_value(path, leaf)

    def _add_value(self, path: tuple[Any, ...], value: object) -> None:
        if isinstance(value, Unreadable):
            self.unreadable.append(value.reason)
        self.entries.append(ForeignLeaf(path, None, (), value))


def _megatron_path(fqn: str) -> tuple[str, ...]:
    """Return the path of an entry of Megatron-Core, which has names and no tree of them."""
    first, dot, rest = fqn.partition(".")
    if first in _MEGATRON_PARTS and dot:
        return (first, rest)
    return ("model", fqn) if dot else (fqn.partition("/")[0], fqn)


def tell_unreadable(url: str, where: str, reasons: Sequence[str], *, way: str = "") -> None:
    """Tell once which values of a foreign checkpoint cannot be read; nothing without any.

    Args:
        url: of what the checkpoint lies in.
        where: what messages call it.
        reasons: why, for each value.
        way: how to have them all the same.
    """
    if reasons:
        tell_once(
            url,
            f"{where}: {len(reasons)} of its values cannot be read, which is an error only for "
            f"whoever wants them: {'; '.join(reasons[:_SHOWN])}{way and '; '}{way}",
        )


class _Blobs:
    """The archives of one checkpoint, by what is in them."""

    def __init__(self, found: _StockMetadata, reading: _Reading) -> None:
        self._places = found.places
        self._reading = reading
        self._numbers = {key: number for number, key in enumerate(reading.keys)}
        # Stock writes each archive once. Were one named again and again, so it would be read.
        claimed = Counter(dict.fromkeys(reading.keys, 0))
        for each in found.places.values():
            claimed[each.key] += each.nbytes
        for key, nbytes in zip(reading.keys, reading.sizes, strict=True):
            if claimed[key] > nbytes:
                raise _broken(
                    reading.where, f"{key} has {nbytes} bytes, {claimed[key]} of which are named"
                )

    def find(self, fqn: str, offsets: Sequence[int]) -> _Blob:
        """Return the archive of the chunk of `fqn` that begins at `offsets`."""
        where = self._reading.where
        # The chunk of a tensor that is not sharded may be kept without offsets.
        found = self._places.get((fqn, tuple(offsets))) or self._places.get((fqn, ()))
        if found is None:
            raise _broken(where, f"{fqn!r} at {list(offsets)} is in no file")
        # Where a compressed chunk begins says nothing of where its elements do.
        if found.is_transformed:
            raise IncompatibleError(f"{where}: {fqn!r} was compressed or transformed by its writer")
        number = self._numbers[found.key]
        if found.offset + found.nbytes > self._reading.sizes[number]:
            raise _broken(where, f"{found.key} ends before {fqn!r} at {list(offsets)} does")
        return _Blob(number, found.offset, found.nbytes)


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
            if not is_key(key):
                raise _broken(where, f"{key!r} is no file of it")
        try:
            # Once for all: nothing is asked of a file behind the end that it had here.
            self.sizes = [store.size(key) for key in keys]
        # The metadata name it: that it is missing is damage, and not that there is no checkpoint.
        except NotFound as error:
            raise IntegrityError(
                f"{where} lacks a file: {error.message}", kind=ErrorKind.MISSING_FILE
            ) from error

    def value(self, fqn: str, blob: _Blob) -> Any:
        """Return a Python value, or what stands for one that cannot be read."""
        try:
            return _Value(self, blob).read()
        # What cannot be read is of no use, but no reason to refuse the rest.
        except (IntegrityError, IncompatibleError) as error:
            return Unreadable(f"{fqn}: {error.message.rpartition('torch.save file: ')[2]}")

    def describe(self, blob: _Blob) -> Any:
        """Return what is in an archive, with a `StoredTensor` in the place of each tensor."""
        key = self.keys[blob.file]
        return torch_files.describe_file(
            self.store, key, start=blob.start, nbytes=blob.nbytes, instead=_INSTEAD
        )

    def tensors(self, blobs: Sequence[_Blob]) -> list[TorchTensor]:
        """Return where the bytes of the tensor in each of `blobs` lie."""
        found: dict[int, TorchTensor] = {}

        def look(numbered: tuple[int, _Blob]) -> None:
            number, blob = numbered
            tensor = self.describe(blob)
            if not isinstance(tensor, TorchTensor):
                key = self.keys[blob.file]
                raise _broken(self.where, f"{key} has something else where a tensor should be")
            found[number] = tensor

        # Small reads, one for each chunk: how many are under way at once is what counts.
        in_parallel(look, enumerate(blobs), threads=min(_THREADS, len(blobs)))
        return [found[number] for number in range(len(blobs))]


class _Value:
    """One Python value that holds, as the values of torch do, dtypes and whole tensors."""

    def __init__(self, reading: _Reading, blob: _Blob) -> None:
        self._reading = reading
        self._blob = blob
        self._left_bytes = _FREE_BYTES + _MAX_EXPANSION * blob.nbytes

    def read(self) -> Any:
        return self._filled(self._reading.describe(self._blob))

    def _filled(self, value: Any) -> Any:
        """Return `value` with what is meant in the place of each stand-in."""
        kind = type(value)
        if kind is TorchTensor:
            return self._tensor(value)
        if kind is DtypeName:
            return dtype_of(value.name)
        if kind is list or kind is tuple:
            return kind(map(self._filled, value))
        # Keys and members of sets hold no tensors, and dtypes only by way of an odd program.
        if kind is dict or kind is OrderedDict or kind is Counter:
            filled: Callable[[Any], Any] = self._filled
            return _REBUILT[kind]((key, filled(item)) for key, item in value.items())
        return value

    def _tensor(self, stored: TorchTensor) -> Inline:
        self._left_bytes -= stored.nbytes
        if self._left_bytes < 0:
            raise _broken(self._reading.where, "its tensors share memory until they are too many")
        raw = bytearray(stored.nbytes)
        key = self._reading.keys[self._blob.file]
        count = self._reading.store.read_into(key, stored.offset, memoryview(raw))
        if count != len(raw):
            raise _broken(self._reading.where, f"{key} ends inside of a tensor")
        # `torch.frombuffer` refuses a buffer of no bytes.
        if not raw:
            return Inline(torch.empty(stored.shape, dtype=dtype_of(stored.dtype)))
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype_of(stored.dtype))
        # As it lay: what was transposed comes back transposed.
        strides = stored.strides or torch.empty(stored.shape, device="meta").stride()
        return Inline(flat.as_strided(stored.shape, strides))


_REBUILT: dict[type, Callable[[Any], Any]] = {
    dict: dict,
    OrderedDict: OrderedDict,
    Counter: lambda items: Counter(dict(items)),
}


def _described(
    reading: _Reading,
    placed: Placed,
    chunks: dict[int, list[tuple[Box, _Blob]]],
    whole: dict[int, tuple[int, TorchTensor]],
) -> Found:
    rows: list[Chunk] = []
    runs = Runs(len(reading.keys))
    # By the number of the entry on both sides: whatever else there is, nothing is shifted.
    numbers = {number: n for n, number in enumerate(placed.tensors)}
    flat = [(number, box, blob) for number, each in chunks.items() for box, blob in each]
    stored = reading.tensors([blob for _, _, blob in flat])
    for (number, box, blob), tensor in zip(flat, stored, strict=True):
        entry: TensorEntry = placed.tensors[number]
        # Ranks cut nothing in several ways: of chunks without elements that alone is asked.
        alike = tensor.shape == box.sizes or (0 in tensor.shape and not volume(box))
        if tensor.dtype != entry.dtype or not alike:
            raise _broken(
                reading.where,
                f"{entry.name!r} at {list(box.offsets)} should be {entry.dtype}{list(box.sizes)} "
                f"and is {tensor.dtype}{list(tensor.shape)}",
            )
        rows.append((numbers[number], *runs.place(tensor, blob.file), box))
    for number, (file, tensor) in whole.items():
        box = Box((0,) * len(tensor.shape), tensor.shape)
        rows.append((numbers[number], *runs.place(tensor, file), box))
    return Found(
        "stock DCP",
        reading.keys,
        reading.sizes,
        list(placed.tensors.values()),
        rows,
        placed.objects,
        permuted=runs.permuted,
    )


def value_in(data: bytes) -> Any:
    """Return the Python value in what `torch.save` wrote, read as those of a checkpoint are.

    Raises:
        IntegrityError: it is no such archive, or holds more than plain values and whole tensors.
        IncompatibleError: a tensor does not fill one run of bytes.
    """
    # All stores of one name are one place, so the key is drawn.
    store, key = MemoryStore("dist_ckpt.foreign"), uuid4().hex
    store.put(key, [data])
    try:
        reading = _Reading(store, [key], "the value")
        return _Value(reading, _Blob(0, 0, len(data))).read()
    finally:
        store.delete([key])


def is_stock(store: Store) -> bool:
    """Tell whether `store` holds a stock checkpoint."""
    return has(store, METADATA)


def _broken(where: str, problem: str) -> IntegrityError:
    return IntegrityError(f"{where}: {problem}", kind=ErrorKind.MALFORMED)


# The `.metadata` of a stock checkpoint: a pickle of DCP's own classes, none of which is built.


_CLASSES = "torch.distributed.checkpoint.metadata"
# Looked up here: no attribute of torch is ever asked for by a name of the stream.
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KINDS = frozenset(
    {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    }
)
# A prefix may stand for any class in it, as none of them is looked up or kept.
_UNREAD = ("torch.distributed.checkpoint.planner", "megatron.core.", "nvidia_resiliency_ext.")


def _shape(sizes: Sequence[Any] = ()) -> tuple[Any, ...]:
    return tuple(sizes)


def _nothing(*_: Any) -> None:
    """Take what nobody asks for: layouts, and where it was saved."""


_CONSTRUCTORS: dict[tuple[str, str], object] = {
    ("torch", "Size"): Constructor(_shape),
    ("torch.serialization", "_get_layout"): Constructor(_nothing),
    ("pathlib", "PosixPath"): Constructor(_nothing),
    ("pathlib", "PurePosixPath"): Constructor(_nothing),
    # Python 3.13 has moved the paths there, and so pickles them.
    ("pathlib._local", "PosixPath"): Constructor(_nothing),
    ("pathlib._local", "PurePosixPath"): Constructor(_nothing),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Kind("_StorageInfo"),
}


@dataclass(frozen=True, slots=True)
class _StockTensor:
    """A tensor: its dtype as torch names it without "torch.", its shape, and its boxes."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _StockEntry:
    """An entry of the saved state dict: its flattened name, its path, the tensor if it is one."""

    fqn: str
    path: tuple[Any, ...]
    tensor: _StockTensor | None


@dataclass(frozen=True, slots=True)
class _StockPlace:
    """Where an archive lies: key of the file, offset and length in it; whether it was changed."""

    key: str
    offset: int
    nbytes: int
    is_transformed: bool


@dataclass(frozen=True, slots=True)
class _StockMetadata:
    """What a `.metadata` says.

    Attributes:
        entries: of the state dict, in their order.
        places: by flattened name, and where the box begins: () if it does not say.
    """

    entries: tuple[_StockEntry, ...]
    places: dict[tuple[str, tuple[int, ...]], _StockPlace]


def _parse_metadata(data: bytes) -> _StockMetadata:
    """Read the pickle `data`, trusting nothing in it; nothing of it is executed or built.

    Raises:
        ValueError: it is no pickle of DCP's metadata.
        IncompatibleError: a tensor has a dtype that cannot be stored.
    """
    try:
        found = unpickle(data, _named)
        fields = _fields(found, "Metadata")
        paths = fields.get("planner_data")
        # Planners of users keep there what they like: then the names are all there is.
        paths = paths if isinstance(paths, dict) else {}
        entries = [
            _entry(fqn, kept, paths.get(fqn, (fqn,)))
            for fqn, kept in _mapping(fields, "state_dict_metadata").items()
        ]
        places = [_place(*item) for item in _mapping(fields, "storage_data").items()]
    # What a constructor makes of its operands is chosen by whoever wrote them.
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(describe(error)) from error
    return _StockMetadata(tuple(entries), dict(places))


def _named(module: str, name: str) -> object:
    if module == _CLASSES and name in _KINDS:
        return Kind(name)
    if (module, name) in _CONSTRUCTORS:
        return _CONSTRUCTORS[module, name]
    # A dtype has no state, and nothing can be set on it: what a stream may change is only `Made`.
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    # Of Megatron-Core: plans that were kept along, and its own kind of the same description. Nobody
    # here asks for what is in them, and the stand-in keeps nothing of it.
    if module.startswith(_UNREAD):
        return Kind("Metadata") if name == "MCoreMetadata" else Unknown(name)
    raise ValueError(f"it refers to {module}.{name}, which is not admitted")


def _fields(found: object, kind: str) -> dict[str, Any]:
    if not isinstance(found, Made) or found.kind.name != kind:
        raise ValueError(f"it has something else where a {kind} should be")
    return found.fields()


def _mapping(fields: dict[str, Any], name: str) -> dict[Any, Any]:
    found = fields.get(name)
    if type(found) is not dict:
        raise ValueError(f"its {name} is no mapping")
    return found


def _entry(fqn: object, kept: object, path: object) -> _StockEntry:
    if type(fqn) is not str or type(path) is not tuple or not path:
        raise ValueError("it has an entry without a name")
    # By exact types: a path is only ever compared and joined, and a subclass could do anything.
    if not all(type(key) in (str, int) for key in path):
        raise ValueError(f"the path of {fqn!r} has something else than names and numbers")
    if isinstance(kept, Made) and kept.kind.name == "BytesStorageMetadata":
        return _StockEntry(fqn, path, None)
    fields = _fields(kept, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    boxes = tuple(Box(_ints(each["offsets"]), _ints(each["sizes"])) for each in chunks)
    shape = _ints(fields["size"])
    # Sizes are what the file claims: here it is refused what no tensor has.
    count_elements(shape)
    return _StockEntry(fqn, path, _StockTensor(_dtype(fields["properties"]), shape, boxes))


def _dtype(properties: object) -> str:
    if not isinstance(properties, Made) or properties.kind.name != "TensorProperties":
        raise ValueError("it has something else where a TensorProperties should be")
    # It pickles itself as a tuple that begins with the dtype.
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else properties.fields().get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise ValueError("it has a tensor without a dtype")
    return dtype_name(dtype)


def _place(index: object, info: object) -> tuple[tuple[str, tuple[int, ...]], _StockPlace]:
    said, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    key, offset, nbytes = (where.get(name) for name in ("relative_path", "offset", "length"))
    if type(said.get("fqn")) is not str or type(key) is not str:
        raise ValueError("it has a place without a name")
    if type(offset) is not int or type(nbytes) is not int or offset < 0 or nbytes < 0:
        raise ValueError(f"{said['fqn']!r} lies nowhere in {key!r}")
    place = _StockPlace(key, offset, nbytes, bool(where.get("transform_descriptors")))
    return (said["fqn"], _ints(said.get("offset") or ())), place


def _ints(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or not all(type(size) is int for size in sizes):
        raise ValueError("it has a shape of something else than whole numbers")
    return tuple(sizes)
