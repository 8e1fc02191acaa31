"""What a stored checkpoint holds, under the names that a stock state dict has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.foreign.dcp_runs import NAMING, NAMING_VERSION, path_of
from dist_ckpt.format import document
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.repository import Checkpoint
from dist_ckpt.state.groups import PREFIX, is_group_name, options_of
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.state.objects import decode, references

Path = tuple[Any, ...]

_VALUE = "value"  # what the parts of dist_ckpt that are one Python value call it


@dataclass(frozen=True, slots=True)
class Catalog:
    """The entries of a checkpoint.

    Attributes:
        checkpoint: where they are.
        tensors: number in the index of each tensor, by flattened name.
        values: gives a Python value, by flattened name.
        paths: where in a state dict each of them lies.
    """

    checkpoint: Checkpoint
    tensors: dict[str, int] = field(default_factory=dict)
    values: dict[str, Callable[[], object]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    def metadata(self) -> Metadata:
        """Return the description that load planners ask for."""
        entries: dict[str, STORAGE_TYPES] = {fqn: BytesStorageMetadata() for fqn in self.values}
        for fqn, number in self.tensors.items():
            tensor = self.checkpoint.index.tensors[number]
            rows = self.checkpoint.index.chunks_of(number)
            entries[fqn] = TensorStorageMetadata(
                TensorProperties(dtype=dtype_of(tensor.dtype)),
                torch.Size(tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(start), torch.Size(size))
                    for start, size in zip(rows.starts.tolist(), rows.sizes.tolist(), strict=True)
                ],
            )
        return Metadata(entries, planner_data=dict(self.paths))

    def add_tensor(self, path: Path, number: int) -> None:
        """Add tensor `number` of the index as the entry at `path`."""
        fqn = _joined(path)
        self.tensors[fqn], self.paths[fqn] = number, path

    def add_value(self, path: Path, value: Callable[[], object]) -> None:
        """Add the Python value that `value` returns as the entry at `path`."""
        fqn = _joined(path)
        self.values[fqn], self.paths[fqn] = value, path


def catalog(checkpoint: Checkpoint) -> Catalog:
    """List the entries of `checkpoint`. Reads its Python values, and no tensor.

    Raises:
        IntegrityError: stored values are damaged.
        IncompatibleError: a newer Writer made the names.
    """
    naming = checkpoint.manifest.versions.get(NAMING)
    if naming is None:
        return _of_parts(checkpoint)
    if naming != NAMING_VERSION:
        raise IncompatibleError(
            f"{checkpoint.where}: its names follow rules {naming}, this program knows "
            f"{NAMING_VERSION}: use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    found = Catalog(checkpoint)
    for number, tensor in enumerate(checkpoint.index.tensors):
        found.add_tensor(path_of(tensor.part, tensor.name), number)
    for part, name, data in _objects(checkpoint):
        path = path_of(part, name)
        found.add_value(path, partial(decode, data, tensors={}, path=_joined(path)))
    return found


def _of_parts(checkpoint: Checkpoint) -> Catalog:
    """List what dist_ckpt itself saved: a part is a key of the state dict, its names lie below.

    The Python values of an optimizer's groups become the list that stock has of them, and a part
    that is one value is taken apart as the stock planner does.
    """
    found = Catalog(checkpoint)
    numbers = {(t.part, t.name): number for number, t in enumerate(checkpoint.index.tensors)}
    inside: set[tuple[str, str]] = set()
    groups: dict[str, int] = {}
    for part, name, data in _objects(checkpoint):
        path: Path = (part,) if name == _VALUE else (part, name)
        if is_group_name(name):
            path = (part, PREFIX, groups.setdefault(part, 0))
            groups[part] += 1
        names = {each: numbers[part, each] for each in references(data, path=_joined(path))}
        inside |= {(part, each) for each in names}
        _add_nested(found, path, data, names, is_group=is_group_name(name))
    for (part, name), number in numbers.items():
        if (part, name) not in inside:
            found.add_tensor((part, name), number)
    return found


def _add_nested(
    found: Catalog, path: Path, data: bytes, numbers: Mapping[str, int], *, is_group: bool
) -> None:
    tensors = found.checkpoint.index.tensors
    blanks = {name: _blank(tensors[number]) for name, number in numbers.items()}
    try:
        value = decode(data, tensors=blanks, path=_joined(path))
    except IncompatibleError:
        # Of a type that this program does not know: said when it is asked for.
        found.add_value(path, partial(decode, data, tensors=blanks, path=_joined(path)))
        return
    if is_group and isinstance(value, dict):
        value = {**options_of(value), "params": value.get("params")}  # stock has no notes
    number_of = {id(blank): numbers[name] for name, blank in blanks.items()}
    for inner, leaf in _leaves(value):
        if id(leaf) in number_of:
            found.add_tensor((*path, *inner), number_of[id(leaf)])
        elif not _holds_tensor(leaf):
            # A tensor in a tuple, say, has no name in any stock state dict: it is not offered.
            found.add_value((*path, *inner), partial(_same, leaf))


def _leaves(value: object) -> Iterator[tuple[Path, object]]:
    """Take `value` apart as the stock planner does a state dict that has it."""
    planner = DefaultSavePlanner(flatten_sharded_tensors=False)
    planner.set_up_planner({"": value}, is_coordinator=True)
    for fqn, leaf in planner.state_dict.items():
        yield tuple(planner.mappings[fqn][1:]), leaf


def _objects(checkpoint: Checkpoint) -> Iterator[tuple[str, str, bytes]]:
    """Yield part, name and encoding of every value that all ranks share.

    What each rank has for itself is not for stock, which takes equal names for one value.
    """
    for entry in checkpoint.index.objects:
        if entry.rank is None:
            where = f"part {entry.part!r} of {checkpoint.where}"
            for name, data in document.decode(checkpoint.read_object(entry), where=where).items():
                yield entry.part, name, data


def _blank(tensor: TensorEntry) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device="meta")


def _holds_tensor(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_tensor, value))


def _same(value: object) -> object:
    return value


def _joined(path: Path) -> str:
    return ".".join(map(str, path))
