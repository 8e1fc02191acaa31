"""What a stored checkpoint holds, under the names that a stock state dict has for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    UsageError,
    without_secrets,
)
from dist_ckpt.foreign.dcp_files import read_stock
from dist_ckpt.foreign.dcp_runs import NAMING, REST, check_naming, path_of, tensors_aside
from dist_ckpt.foreign.dcp_tree import Tree, read_tree
from dist_ckpt.foreign.leaves import ForeignLeaf, Path, dotted
from dist_ckpt.foreign.names import Placed
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.foreign.tensors_aside import TensorsAside
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.manifest import decode_document
from dist_ckpt.format.names import step_dir
from dist_ckpt.repository import Checkpoint
from dist_ckpt.repository.source import Source
from dist_ckpt.state.decoding import decode, references, references_aside
from dist_ckpt.state.encoding import Unreadable, encode
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.state.optimizer_content import PREFIX, STATE, Notes, is_group_name, options_of
from dist_ckpt.state.rebuilding import Building
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.storage.base import Store

# Elements of a whole for each that is stored of it: with the longest there are, of one bit each.
_MOST_PER_ELEMENT = 128


@dataclass(frozen=True, slots=True)
class Catalog:
    """The entries of a checkpoint.

    Attributes:
        source: where they are.
        tensors: number in the index of each tensor, by flattened name.
        values: gives a Python value, by flattened name.
        paths: where in a state dict each of them lies.
        tree: what the planner of the save said of that, where it was kept.
        faces: what is several tensors behind one face, by flattened name: how it is made.
    """

    source: Source
    tensors: dict[str, int] = field(default_factory=dict)
    values: dict[str, Callable[[], object]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    tree: Tree | None = None
    faces: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def metadata(self) -> Metadata:
        """Return the description that load planners ask for."""
        # Without a tree each name is a path of the part and the rest (format-v1, 4.3).
        planner_data = dict(self.paths) if self.tree is None else self.tree.planner_data
        where = without_secrets(self.source.store.url)
        if isinstance(self.source, Checkpoint):
            where = f"{where}/{step_dir(self.source.step)}"
        metadata = Metadata(
            {fqn: self._described(fqn) for fqn in self._in_order(planner_data)},
            planner_data=planner_data,
            storage_meta=StorageMeta(checkpoint_id=where, save_id=self.source.save_id),
        )
        # A release of torch that does not have it writes and reads none.
        if hasattr(metadata, "version"):
            metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
        return metadata

    def add_tensor(self, path: Path, number: int) -> None:
        """Add tensor `number` of the index as the entry at `path`."""
        fqn = dotted(path)
        self.tensors[fqn], self.paths[fqn] = number, path

    def add_face(self, path: Path, noted: Mapping[str, Any]) -> None:
        """Add the tensors that are the entry at `path` behind one face, which are there already."""
        fqn = dotted(path)
        inner = [fqn + suffix for suffix in Building(noted, fqn).suffixes()]
        if not isinstance(noted.get("dtype"), torch.dtype):
            return  # of before it was noted: its tensors are entries of their own
        stored = [self.source.tensors[self.tensors[n]] for n in inner if n in self.tensors]
        most = sum(math.prod(each.shape) for each in stored) * _MOST_PER_ELEMENT
        if math.prod(noted["shape"]) > most:  # whoever makes room for it would be made to run out
            raise IntegrityError(
                f"{self.source.where}: {fqn!r} is larger than what is stored of it",
                kind=ErrorKind.MALFORMED,
            )
        for name in inner:
            if name != fqn:
                # Still in `tensors`, by which a load fills the face; only not offered as an entry.
                self.paths.pop(name, None)
        self.faces[fqn], self.paths[fqn] = noted, path

    def add_value(self, path: Path, value: Callable[[], object]) -> None:
        """Add the Python value that `value` returns as the entry at `path`."""
        fqn = dotted(path)
        self.values[fqn], self.paths[fqn] = value, path

    def _in_order(self, planner_data: object) -> Iterator[str]:
        """Yield the names as the state dict had them, as far as its planner said."""
        if isinstance(planner_data, dict):
            yield from (fqn for fqn in planner_data if fqn in self.paths)
            yield from (fqn for fqn in self.paths if fqn not in planner_data)
        else:
            yield from self.paths

    def _described(self, fqn: str) -> STORAGE_TYPES:
        face = self.faces.get(fqn)
        if face is not None:
            # One piece: how it was cut is that of the tensors inside, which no planner asks for.
            shape = torch.Size(face["shape"])
            whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
            return TensorStorageMetadata(TensorProperties(dtype=face["dtype"]), shape, [whole])
        number = self.tensors.get(fqn)
        if number is None:
            return BytesStorageMetadata()
        tensor = self.source.tensors[number]
        rows = self.source.index.chunks_of(number)
        return TensorStorageMetadata(
            TensorProperties(dtype=dtype_of(tensor.dtype)),
            torch.Size(tensor.shape),
            [
                ChunkStorageMetadata(torch.Size(start), torch.Size(size))
                for start, size in zip(rows.starts.tolist(), rows.sizes.tolist(), strict=True)
            ],
        )


def catalog(source: Source) -> Catalog:
    """List the entries of `source`. Reads its Python values, and no tensor.

    Raises:
        IntegrityError: stored values are damaged.
        IncompatibleError: a newer Writer made the names.
    """
    naming = None if source.manifest is None else source.manifest.versions.get(NAMING)
    if naming is None or not isinstance(source, Checkpoint):
        return _of_parts(source)
    # Before any name is looked at: rules that are not known here must be refused, not misread.
    check_naming(source)
    found = Catalog(source, tree=read_tree(source))
    objects = list(_objects(source))
    # What a Python value refers to is a part of it, and no entry (format-v1, 4.4).
    inside = {
        (part, inner) for part, _, data in objects for inner in tensors_aside(source, part, data)
    }
    for number, tensor in enumerate(source.tensors):
        if (tensor.part, tensor.name) not in inside:
            found.add_tensor(path_of(tensor.part, tensor.name), number)
    aside = {part: TensorsAside(source, part) for part in {part for part, _ in inside}}
    for part, name, data in objects:
        path = path_of(part, name)
        tensors: Mapping[str, torch.Tensor] = aside.get(part, {})
        found.add_value(path, partial(decode, data, tensors=tensors, path=dotted(path)))
    # Last, as a face is made of tensors that are listed by then.
    for fqn, noted in (found.tree.faces if found.tree is not None else {}).items():
        found.add_face((fqn,), noted)
    return found


def stock_catalog(store: Store) -> Catalog:
    """List the entries of the stock checkpoint in `store`, under the names that it has for them.

    Raises:
        IntegrityError: it is malformed or incomplete.
        IncompatibleError: it holds something that cannot be read.
    """
    paths: dict[str, Path] = {}

    def place(entries: Sequence[ForeignLeaf], where: str) -> Placed:
        placed = Placed()
        values = placed.objects.setdefault(REST, {})
        for number, entry in enumerate(entries):
            fqn = dotted(entry.path)
            paths[fqn] = entry.path
            if entry.dtype is not None:
                placed.tensors[number] = TensorEntry(REST, fqn, entry.dtype, entry.shape)
                continue
            try:
                values[fqn] = encode(entry.value, path=fqn, aside=False)
            except UsageError as error:
                # Of no use, but no reason to refuse the rest: whoever wants it is told why.
                values[fqn] = encode(Unreadable(f"{where}: {error.message}"), path=fqn)
        return placed

    source = ForeignSource.of(store, read_stock(store, place=place))
    found = Catalog(source)
    numbers = {tensor.name: number for number, tensor in enumerate(source.tensors)}
    values = source.read_objects(REST, rank=0)
    for fqn, path in paths.items():
        if fqn in numbers:
            found.add_tensor(path, numbers[fqn])
        else:
            found.add_value(path, partial(decode, values[fqn], tensors={}, path=fqn))
    return found


def _of_parts(source: Source) -> Catalog:
    """List what dist_ckpt itself saved: a part is a key of the state dict, its names lie below.

    The Python values of an optimizer's groups become the list that stock has of them, its state
    the tree that stock has, and a part that is one value is taken apart as the stock planner does.
    """
    found = Catalog(source)
    numbers = {(t.part, t.name): number for number, t in enumerate(source.tensors)}
    objects = list(_objects(source))
    stored_groups = list(_groups(objects, source.tensors))
    parameters: dict[str, set[str]] = {}
    for part, group in stored_groups:
        parameters.setdefault(part, set()).update(map(str, group["params"]))
    inside: set[tuple[str, str]] = set()
    groups: dict[str, int] = {}
    for part, name, data in objects:
        path: Path = (part,) if name == VALUE else _path(part, name, parameters)
        if is_group_name(name):
            path = (part, PREFIX, groups.setdefault(part, 0))
            groups[part] += 1
        names = {
            each: _number_of(each, part, numbers, path)
            for each in references(data, path=dotted(path))
        }
        inside |= {(part, each) for each in names}
        aside = {}
        if isinstance(source, Checkpoint):
            stored = TensorsAside(source, part)
            aside = {each: stored[each] for each in references_aside(data, path=dotted(path))}
        _add_nested(found, path, data, names, aside, is_group=is_group_name(name))
    for (part, name), number in numbers.items():
        if (part, name) not in inside:
            found.add_tensor(_path(part, name, parameters), number)
    for part, group in stored_groups:
        for name, noted in Notes.read([group]).made.items():
            found.add_face(_path(part, name, parameters), noted)
    return found


def _number_of(name: str, part: str, numbers: Mapping[tuple[str, str], int], path: Path) -> int:
    if (part, name) not in numbers:
        raise IntegrityError(
            f"the value {dotted(path)} has the tensor {part}/{name} in it, which is not stored",
            kind=ErrorKind.MALFORMED,
        )
    return numbers[part, name]


def _groups(
    objects: Sequence[tuple[str, str, bytes]], tensors: Sequence[TensorEntry]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the groups of each optimizer, with its part."""
    # Without memory: what is asked of a group is its names and numbers, and no tensor is read.
    blanks = {each.name: _blank(each) for each in tensors}
    for part, name, data in objects:
        if is_group_name(name):
            try:
                group = decode(data, tensors=blanks, path=f"{part}.{name}")
            except IncompatibleError:
                continue  # said of the group when it is asked for
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                yield part, group


def _path(part: str, name: str, parameters: Mapping[str, set[str]]) -> Path:
    """Return where the entry `name` of `part` lies: an optimizer's below its parameter."""
    if part in parameters and name.startswith(STATE):
        rest = name.removeprefix(STATE)
        cut = rest.rfind(".")
        while cut > 0:  # a parameter's name has dots, and so may a key
            if rest[:cut] in parameters[part]:
                return part, STATE.removesuffix("."), rest[:cut], rest[cut + 1 :]
            cut = rest.rfind(".", 0, cut)
    return part, name


def _add_nested(
    found: Catalog,
    path: Path,
    data: bytes,
    numbers: Mapping[str, int],
    aside: Mapping[str, torch.Tensor],
    *,
    is_group: bool,
) -> None:
    tensors = found.source.tensors
    blanks = {name: _blank(tensors[number]) for name, number in numbers.items()}
    try:
        value = decode(data, tensors={**blanks, **aside}, path=dotted(path))
    except IncompatibleError:
        # Of a type that this program does not know: said when it is asked for.
        read = partial(decode, data, tensors={**blanks, **aside}, path=dotted(path))
        found.add_value(path, read)
        return
    if is_group and isinstance(value, dict):
        value = {**options_of(value), "params": value.get("params")}  # stock has no notes
    # Decoding puts these very objects where the value has its tensors, so they can be told by that.
    number_of = {id(blank): numbers[name] for name, blank in blanks.items()}
    for inner, leaf in _leaves(value):
        if id(leaf) in number_of:
            found.add_tensor((*path, *inner), number_of[id(leaf)])
        elif not _holds_tensor(leaf):
            # A tensor in a tuple, say, has no name in any stock state dict: it is not offered.
            found.add_value((*path, *inner), partial(_same, leaf))


def _leaves(value: object) -> Iterator[tuple[Path, object]]:
    """Take `value` apart as the stock planner does a state dict that has it."""
    # By torch's own code, so that names are those that its release would give them; and below a
    # key, taken off again, as a value may be no dict at all.
    planner = DefaultSavePlanner(flatten_sharded_tensors=False)
    planner.set_up_planner({"": value}, is_coordinator=True)
    for fqn, leaf in planner.state_dict.items():
        yield tuple(planner.mappings[fqn][1:]), leaf


def _objects(source: Source) -> Iterator[tuple[str, str, bytes]]:
    """Yield part, name and encoding of every value that all ranks share.

    What each rank has for itself is not for stock, which takes equal names for one value.
    """
    if not isinstance(source, Checkpoint):
        for part in source.parts:
            for name, data in source.read_objects(part, rank=0).items():
                yield part, name, data
        return
    for entry in source.index.objects:
        if entry.rank is None:
            where = f"part {entry.part!r} of {source.where}"
            for name, data in decode_document(source.read_object(entry), where=where).items():
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
    return deepcopy(value)  # as if it were decoded for each who asks
