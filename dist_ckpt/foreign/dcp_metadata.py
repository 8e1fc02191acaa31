"""The `.metadata` of a stock checkpoint: a pickle of DCP's own classes, none of which is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_ckpt.errors import describe
from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Unknown
from dist_ckpt.foreign.unpickle import unpickle
from dist_ckpt.format.boxes import Box
from dist_ckpt.format.limits import count_elements
from dist_ckpt.state.layout import dtype_name

_METADATA = "torch.distributed.checkpoint.metadata"
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
    ("pathlib._local", "PosixPath"): Constructor(_nothing),
    ("pathlib._local", "PurePosixPath"): Constructor(_nothing),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Kind("_StorageInfo"),
}


@dataclass(frozen=True, slots=True)
class StockTensor:
    """A tensor: its dtype as torch names it without "torch.", its shape, and its boxes."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class StockEntry:
    """An entry of the saved state dict: its flattened name, its path, the tensor if it is one."""

    fqn: str
    path: tuple[Any, ...]
    tensor: StockTensor | None


@dataclass(frozen=True, slots=True)
class StockPlace:
    """Where an archive lies: key of the file, offset and length in it; whether it was changed."""

    key: str
    offset: int
    nbytes: int
    is_transformed: bool


@dataclass(frozen=True, slots=True)
class StockMetadata:
    """What a `.metadata` says.

    Attributes:
        entries: of the state dict, in their order.
        places: by flattened name, and where the box begins: () if it does not say.
    """

    entries: tuple[StockEntry, ...]
    places: dict[tuple[str, tuple[int, ...]], StockPlace]


def parse_metadata(data: bytes) -> StockMetadata:
    """Read the pickle `data`, trusting nothing in it; nothing of it is executed or built.

    Raises:
        ValueError: it is no pickle of DCP's metadata.
        IncompatibleError: a tensor has a dtype that cannot be stored.
    """
    try:
        found = unpickle(data, _named)
        fields = _fields(found, "Metadata")
        paths = fields.get("planner_data")
        paths = paths if isinstance(paths, dict) else {}
        entries = [
            _entry(fqn, kept, paths.get(fqn, (fqn,)))
            for fqn, kept in _mapping(fields, "state_dict_metadata").items()
        ]
        places = [_place(*item) for item in _mapping(fields, "storage_data").items()]
    # What a constructor makes of its operands is chosen by whoever wrote them.
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(describe(error)) from error
    return StockMetadata(tuple(entries), dict(places))


def _named(module: str, name: str) -> object:
    if module == _METADATA and name in _KINDS:
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


def _entry(fqn: object, kept: object, path: object) -> StockEntry:
    if type(fqn) is not str or type(path) is not tuple or not path:
        raise ValueError("it has an entry without a name")
    if not all(type(key) in (str, int) for key in path):
        raise ValueError(f"the path of {fqn!r} has something else than names and numbers")
    if isinstance(kept, Made) and kept.kind.name == "BytesStorageMetadata":
        return StockEntry(fqn, path, None)
    fields = _fields(kept, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    boxes = tuple(Box(_ints(each["offsets"]), _ints(each["sizes"])) for each in chunks)
    shape = _ints(fields["size"])
    count_elements(shape)
    return StockEntry(fqn, path, StockTensor(_dtype(fields["properties"]), shape, boxes))


def _dtype(properties: object) -> str:
    if not isinstance(properties, Made) or properties.kind.name != "TensorProperties":
        raise ValueError("it has something else where a TensorProperties should be")
    # It pickles itself as a tuple that begins with the dtype.
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else properties.fields().get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise ValueError("it has a tensor without a dtype")
    return dtype_name(dtype)


def _place(index: object, info: object) -> tuple[tuple[str, tuple[int, ...]], StockPlace]:
    said, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    key, offset, nbytes = (where.get(name) for name in ("relative_path", "offset", "length"))
    if type(said.get("fqn")) is not str or type(key) is not str:
        raise ValueError("it has a place without a name")
    if type(offset) is not int or type(nbytes) is not int or offset < 0 or nbytes < 0:
        raise ValueError(f"{said['fqn']!r} lies nowhere in {key!r}")
    place = StockPlace(key, offset, nbytes, bool(where.get("transform_descriptors")))
    return (said["fqn"], _ints(said.get("offset") or ())), place


def _ints(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or not all(type(size) is int for size in sizes):
        raise ValueError("it has a shape of something else than whole numbers")
    return tuple(sizes)
