"""Checkpoints that `dist_ckpt.dcp.Writer` wrote, under the names that the parts of a state have.

The Writer keeps the names of a stock state dict, and stock takes optimizers and dicts apart. Here
their leaves are sorted into parts as those of a stock directory are: nothing is copied, and reads
go to the checkpoint as it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.foreign.dcp_tree import Tree, read_tree
from dist_ckpt.foreign.leaves import ForeignLeaf, Path, dotted
from dist_ckpt.foreign.names import Placed, sort_into_parts
from dist_ckpt.foreign.tensors_aside import TensorsAside
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.format.manifest import Manifest, decode_document
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.source import Source
from dist_ckpt.state.decoding import may_refer, references
from dist_ckpt.state.encoding import Encoded
from dist_ckpt.state.rebuilding import Building
from dist_ckpt.storage.base import Store

REST = "state"
"""The part of all that lies in no part of its own."""

NAMING = "dcp_names"
"""The entry of a manifest's versions that says by which release of these rules names were made."""

_NAMING_VERSION = "1"
_NAMING_VERSION_ASIDE = "2"  # some tensors are no entries, but what is large in Python values

_ASIDE = "!"


def naming_version(*, aside: bool) -> str:
    """Return by which rules names are made, if tensors of Python values are among them, or not."""
    return _NAMING_VERSION_ASIDE if aside else _NAMING_VERSION


def aside_name(rank: int, name: str) -> str:
    """Return what the names begin with of what is large in the Python value `name`.

    No two values have the same beginning, and no usual name begins so.
    """
    # With its length, as names have dots: else one value could begin as another one does.
    return f"{_ASIDE}{rank}.{len(name)}.{name}"


def check_naming(checkpoint: Checkpoint) -> None:
    """Check that this program knows the rules by which the Writer made names.

    Raises:
        IncompatibleError: a newer one did.
    """
    naming = checkpoint.manifest.versions[NAMING]
    known = (_NAMING_VERSION, _NAMING_VERSION_ASIDE)
    if naming not in known:
        raise IncompatibleError(
            f"{checkpoint.where}: its names follow rules {naming}, this program knows "
            f"{' and '.join(known)}: use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )


def tensors_aside(checkpoint: Checkpoint, part: str, data: bytes) -> tuple[str, ...]:
    """Return the names of the tensors of `part` that belong to the encoded value `data`."""
    # By the first rules what looks like a reference is a value.
    if checkpoint.manifest.versions[NAMING] != _NAMING_VERSION_ASIDE:
        return ()
    return references(data, path=part) if may_refer(data) else ()


def path_of(part: str, name: str) -> tuple[str, ...]:
    """Return the path in a state dict of what the Writer stored so; dotted it is its name."""
    return (name,) if part == REST else (part, name)


def in_parts(source: Source, *, whole: Collection[str] = ()) -> Source:
    """Return `source` with its entries sorted into parts, were it one that the Writer wrote.

    Args:
        source: the checkpoint.
        whole: see `sort_into_parts`.
    """
    if isinstance(source, Checkpoint) and NAMING in source.manifest.versions:
        return DcpRun(source, whole=whole)
    return source


class DcpRun:
    """The `Source` of what the Writer wrote, with the names of parts. Sorted at the first look.

    Args:
        checkpoint: as it was written.
        whole: see `sort_into_parts`.
    """

    def __init__(self, checkpoint: Checkpoint, *, whole: Collection[str] = ()) -> None:
        self._checkpoint = checkpoint
        self._whole = whole
        self._sorted: tuple[Placed, Index] | None = None
        self._damaged: dict[str, IntegrityError] = {}
        self._lock = threading.Lock()

    @property
    def store(self) -> Store:
        """Where its files are."""
        return self._checkpoint.store

    @property
    def where(self) -> str:
        """How messages name this checkpoint."""
        return self._checkpoint.where

    @property
    def step(self) -> int:
        """The training step."""
        return self._checkpoint.step

    @property
    def save_id(self) -> str:
        """The attempt that wrote it."""
        return self._checkpoint.save_id

    @property
    def saved_world_size(self) -> int:
        """How many ranks saved it."""
        return self._checkpoint.saved_world_size

    @property
    def manifest(self) -> Manifest:
        """What was committed."""
        return self._checkpoint.manifest

    @property
    def index(self) -> Index:
        """Where every byte lies."""
        return self._look()[1]

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Every tensor, under its name in a part."""
        return self.index.tensors

    @property
    def nbytes(self) -> int:
        """How many bytes its files have."""
        return self._checkpoint.nbytes

    def index_of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        """Return what there must be to read boxes. See `Source.index_of`."""
        # Numbers of tensors are those of the checkpoint; their names alone differ.
        return replace(self._checkpoint.index_of(wanted), tensors=self.tensors)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that its names were sorted into."""
        placed, index = self._look()
        named = (tensor.part for tensor in index.tensors)
        return tuple(dict.fromkeys([*named, *placed.objects, *self._damaged]))

    @property
    def verified(self) -> bool:
        """Whether there are digests: always."""
        return True

    def check_sizes(self) -> None:
        """See `Source.check_sizes`."""
        self._checkpoint.check_sizes()

    def still_there(self) -> bool:
        """See `Source.still_there`."""
        return self._checkpoint.still_there()

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Source.read_into`."""
        self._checkpoint.read_into(file, start, *buffers)

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Source.compare`."""
        self._checkpoint.compare(file, start, *buffers)

    def read_objects(self, part: str, *, rank: int) -> dict[str, bytes]:
        """Return the encoded Python values of `part`: all ranks share them.

        Raises:
            IntegrityError: the values that were stored for this part are damaged.
        """
        placed, _ = self._look()
        if part in self._damaged:
            raise self._damaged[part]
        return dict(placed.objects.get(part, {}))

    def _look(self) -> tuple[Placed, Index]:
        with self._lock:
            if self._sorted is None:
                check_naming(self._checkpoint)
                index = self.index_as_written
                tree = self._tree()
                paths = self._paths(tree)
                values = list(self._values())
                aside = {
                    (part, name)
                    for part, _, value in values
                    for name in tensors_aside(self._checkpoint, part, value.data)
                }
                # What was put aside of a value is no leaf: it comes back with the value.
                entries = [each for each in index.tensors if (each.part, each.name) not in aside]
                leaves = [
                    *_tensor_leaves(entries, paths or {}, {} if tree is None else tree.faces),
                    *_value_leaves(values, paths or {}),
                ]
                placed = sort_into_parts(
                    leaves, self.where, guessed=paths is None, whole=self._whole
                )
                # Of each tensor only the name changes, so all that refers to one stays right.
                self._sorted = placed, replace(index, tensors=self._renamed(placed, aside))
            return self._sorted

    def _tree(self) -> Tree | None:
        """Return what the Writer kept beside the entries, if that can be read."""
        with suppress(IncompatibleError):  # a planner's own, of types that are not known
            return read_tree(self._checkpoint)
        return None

    def _paths(self, tree: Tree | None) -> Mapping[str, Any] | None:
        """Return the path of each flattened name, if the Writer kept them.

        Without them the names are all that is known: where keys end in one, it does not tell.
        """
        if tree is not None and isinstance(tree.planner_data, Mapping):
            return tree.planner_data
        return None

    @property
    def index_as_written(self) -> Index:
        """The index with the names that the Writer stored."""
        return self._checkpoint.index

    def _renamed(self, placed: Placed, aside: Set[tuple[str, str]]) -> tuple[TensorEntry, ...]:
        """Return the tensors under the names in `placed`, those of values in the part of these."""
        homes = {
            name: part
            for part, values in placed.objects.items()
            for data in values.values()
            for name in tensors_aside(self._checkpoint, part, data)
        }
        numbers = itertools.count()  # of those that are leaves
        return tuple(
            # One that no value names any more was read into the value.
            TensorEntry(homes.get(each.name, REST), each.name, each.dtype, each.shape)
            if (each.part, each.name) in aside
            else placed.tensors[next(numbers)]
            for each in self.index_as_written.tensors
        )

    def _values(self) -> Iterator[tuple[str, str, Encoded]]:
        """Yield part, name and encoding of every Python value."""
        for entry in self.index_as_written.objects:
            where = f"part {entry.part!r} of {self.where}"
            try:
                data = self._checkpoint.read_object(entry)
                values = decode_document(data, where=where)
            except IntegrityError as error:
                # Said to whoever wants this part: the others are whole.
                self._damaged[entry.part] = error
                continue
            for name, value in values.items():
                yield entry.part, name, Encoded(value, TensorsAside(self._checkpoint, entry.part))


def _tensor_leaves(
    tensors: Iterable[TensorEntry],
    tree: Mapping[str, Any],
    faces: Mapping[str, Mapping[str, Any]],
) -> Iterator[ForeignLeaf]:
    """Yield the tensors in their order."""
    inner = {
        fqn + suffix: (fqn, suffix)
        for fqn, noted in faces.items()
        for suffix in Building(noted, fqn).suffixes()
    }
    for tensor in tensors:
        known = path_of(tensor.part, tensor.name)
        found = inner.get(dotted(known))
        if found is None:
            path = _path(known, tree)
            yield ForeignLeaf(path, tensor.dtype, tensor.shape)
            continue
        fqn, suffix = found
        # Named as the whole is, so that whoever has such a one finds them.
        whole = (*known[:-1], known[-1].removesuffix(suffix))
        *above, last = _path(whole, tree)
        path = (*above, f"{last}{suffix}")
        yield ForeignLeaf(path, tensor.dtype, tensor.shape, made=(suffix, faces[fqn]))


def _value_leaves(
    values: Iterable[tuple[str, str, Encoded]], tree: Mapping[str, Any]
) -> Iterator[ForeignLeaf]:
    for part, name, value in values:
        yield ForeignLeaf(_path(path_of(part, name), tree), None, (), value)


def _path(known: tuple[str, ...], tree: Mapping[str, Any]) -> Path:
    """Return the path that the planner gave to an entry, or what is known of it without."""
    path = tree.get(dotted(known))
    if not isinstance(path, tuple | list) or dotted(tuple(path)) != dotted(known):
        return known  # planners of users keep there whatever they like
    return tuple(path) if all(type(key) in (str, int) for key in path) else known
