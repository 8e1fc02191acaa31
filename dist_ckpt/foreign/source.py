"""Checkpoints that other programs wrote, described as ours are: which bytes are which box."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound, UsageError, describe
from dist_ckpt.foreign.torch_files import TorchTensor
from dist_ckpt.format import whole as whole_format
from dist_ckpt.format.files import DIGEST_BYTES, FileEntry, block_count, file_digest, itemsize
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import FILES_LIMIT, shard_name
from dist_ckpt.storage.base import Scatter, Store, read_file

Chunk = tuple[int, int, int, Box]
"""Tensor number, file number, byte offset in the file, box."""

# Names of one memory (ties, layers used again) are a few dozen; what claims more than that is made
# to take memory that its files do not have.
_MAX_NAMES = 32
_FREE_BYTES = 1 << 20

Objects = Mapping[str, Mapping[str, bytes]]
"""Encoded Python values by part and name."""


@decodable
class Permuted(msgspec.Struct, frozen=True):
    """A run of bytes whose last dimension is not innermost; read, it is put into that order.

    Attributes:
        file: number of the file.
        offset: where in it the run begins.
        shape: in elements.
        strides: in elements, along each dimension.
        itemsize: bytes of an element.
    """

    file: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """How long the run is."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader of some format made out.

    Attributes:
        format: the name of the format, for messages and reports.
        keys: of each file, in the store.
        nbytes: the size of each of them.
        tensors: what there is.
        chunks: where the raw bytes of each box lie: little-endian, the last dimension innermost.
        objects: Python values.
        step: the training step, 0 if nothing says.
        permuted: each stands for a file of its own in `chunks`; their numbers follow those of
            the files.
        is_adapter: whether it is an adapter, without the model under it.
    """

    format: str
    keys: Sequence[str]
    nbytes: Sequence[int]
    tensors: Sequence[TensorEntry]
    chunks: Iterable[Chunk]
    objects: Objects = field(default_factory=dict)
    step: int = 0
    permuted: Sequence[Permuted] = ()
    is_adapter: bool = False


@decodable
class _Message(msgspec.Struct, frozen=True):
    """What rank 0 tells the others of a checkpoint that it opened."""

    format: str
    keys: list[str]
    index: bytes
    objects: dict[str, dict[str, bytes]]
    step: int
    permuted: list[Permuted]
    is_adapter: bool


class Runs:
    """Where the runs of bytes of one checkpoint lie, those out of order set apart.

    Attributes:
        permuted: the latter.
    """

    def __init__(self, files: int) -> None:
        """Begin with the number of files."""
        self._files = files
        self.permuted: list[Permuted] = []

    def place(self, tensor: TorchTensor, file: int) -> tuple[int, int]:
        """Return the number of the file that a chunk is in, and its offset there."""
        if not tensor.strides:
            return file, tensor.offset
        self.permuted.append(
            Permuted(file, tensor.offset, tensor.shape, tensor.strides, itemsize(tensor.dtype))
        )
        return self._files + len(self.permuted) - 1, 0


class ForeignSource:
    """The `Source` of what another program wrote. Nothing in it can be verified.

    Attributes:
        store: where its files are.
        format: what wrote it.
        index: where every byte lies; the digests in it are blank.
        is_adapter: whether it is an adapter, without the model under it.
    """

    def __init__(self, store: Store, message: bytes) -> None:
        """Open what `describe` returned, perhaps on another rank.

        Raises:
            IntegrityError: the description is not that of a whole checkpoint.
        """
        told = msgspec.msgpack.decode(message, type=_Message)
        self.store = store
        self.message = message
        self.format = told.format
        # Decoding checks everything that is checked of our own: names, bounds, coverage.
        self.index: Index = whole_format.decode(told.index)
        self._keys = told.keys
        self._objects = told.objects
        self._step = told.step
        self._permuted = told.permuted
        self.is_adapter = told.is_adapter
        # The last one read: its pieces are asked for one after another, by several threads.
        self._row_major: tuple[int, memoryview] | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, store: Store, found: Found) -> ForeignSource:
        """Open what a reader made out.

        Raises:
            IntegrityError: chunks that do not tile their tensor, bytes outside their file, names
                that no text has, or many times more bytes of tensors than there are in the files.
        """
        try:
            return cls._of(store, found)
        # What is wrong is what was found, and no call.
        except (UsageError, UnicodeEncodeError, OverflowError) as error:
            raise IntegrityError(
                f"the {found.format} checkpoint in {store.url}: {describe(error)}",
                kind=ErrorKind.MALFORMED,
            ) from error

    @classmethod
    def _of(cls, store: Store, found: Found) -> ForeignSource:
        claimed = sum(math.prod(each.shape) * itemsize(each.dtype) for each in found.tensors)
        if claimed > _FREE_BYTES + _MAX_NAMES * sum(found.nbytes):
            raise IntegrityError(
                f"the {found.format} checkpoint in {store.url} claims tensors of {claimed} bytes, "
                f"and its files have {sum(found.nbytes)}",
                kind=ErrorKind.MALFORMED,
            )
        files = []
        for run in found.permuted:
            # To the index a run is a file of its own, so the end of the true one is looked at here.
            if run.offset + run.nbytes > found.nbytes[run.file]:
                raise IntegrityError(
                    f"{found.keys[run.file]} in {store.url} ends before what its tensors take",
                    kind=ErrorKind.TRUNCATED,
                )
        sizes = [*found.nbytes, *(run.nbytes for run in found.permuted)]
        for number, nbytes in enumerate(sizes):
            # No digest of these bytes is known: `verified` keeps anybody from comparing these.
            blank = bytes(DIGEST_BYTES * block_count(nbytes))
            # The number in a name has a limit: what is beyond goes into that of the rank.
            high, low = divmod(number, FILES_LIMIT)
            name = shard_name("file", high, number=low)
            files.append(FileEntry(name, nbytes, file_digest(blank), blank))
        index = Index.build(files, list(found.tensors), [], found.chunks)
        objects = {part: dict(values) for part, values in found.objects.items()}
        message = _Message(
            found.format,
            list(found.keys),
            whole_format.encode(index),
            objects,
            found.step,
            list(found.permuted),
            found.is_adapter,
        )
        return cls(store, msgspec.msgpack.encode(message))

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Every tensor."""
        return self.index.tensors

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its files in the store."""
        return tuple(self._keys)

    @property
    def nbytes(self) -> int:
        """How many bytes its files have."""
        return sum(file.nbytes for file in self.index.files)

    def index_of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        """Return all of the index: it is here already. See `Source.index_of`."""
        return self.index

    @property
    def where(self) -> str:
        """How messages name this checkpoint."""
        return f"the {self.format} checkpoint in {self.store.url}"

    @property
    def step(self) -> int:
        """The training step; 0 if nothing says."""
        return self._step

    @property
    def save_id(self) -> str:
        """The name of the format."""
        return self.format

    @property
    def saved_world_size(self) -> int:
        """Not known."""
        return 0

    @property
    def manifest(self) -> Manifest | None:
        """There is none."""
        return None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that its names were sorted into."""
        named = (tensor.part for tensor in self.index.tensors)
        return tuple(dict.fromkeys([*named, *self._objects]))

    @property
    def verified(self) -> bool:
        """There are no digests to verify anything by."""
        return False

    def check_sizes(self) -> None:
        """Compare the size of every file with what was found when it was described.

        Raises:
            IntegrityError: a file is missing, or has another size.
        """
        # The index has permuted runs behind the files, and these have no key.
        for key, entry in zip(self._keys, self.index.files, strict=False):
            try:
                nbytes = self.store.size(key)
            except NotFound as error:
                raise self._missing(key) from error
            if nbytes != entry.nbytes:
                raise IntegrityError(
                    f"{self.where}: file {key} holds {nbytes} bytes, and held {entry.nbytes}",
                    kind=ErrorKind.TRUNCATED,
                )

    def still_there(self) -> bool:
        """Taken for granted: there is no manifest by whose going one could tell."""
        return True

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """Fill `buffers` with the bytes of file number `file` from `start` on; see `Source`.

        Raises:
            IntegrityError: the file is missing or shorter.
        """
        # Permuted runs are numbered behind the files, see `Found.permuted`.
        if file >= len(self._keys):
            into = Scatter(buffers)
            # Out of the one run that is kept, as its pieces are asked for one after another.
            into.write(0, self._in_order(file - len(self._keys))[start : start + into.nbytes])
            return
        key = self._keys[file]
        try:
            count = read_file(self.store, key, start, buffers)
        except NotFound as error:
            raise self._missing(key) from error
        if count != sum(map(len, buffers)):
            raise IntegrityError(
                f"{self.where}: file {key} ends at byte {start + count}, before what its tensors "
                "take",
                kind=ErrorKind.TRUNCATED,
            )

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """Take the bytes as they are: there are no digests. See `Source.compare`."""

    def _in_order(self, number: int) -> memoryview:
        """Return the bytes of a permuted run with its last dimension innermost.

        The run is read whole, and takes twice its size of host memory meanwhile.
        """
        with self._lock:
            if self._row_major is None or self._row_major[0] != number:
                run = self._permuted[number]
                raw = bytearray(run.nbytes)
                self.read_into(run.file, run.offset, memoryview(raw))
                strides = [step * run.itemsize for step in run.strides]
                # Elements are bytes to be moved: numpy has not every dtype of torch.
                view = np.ndarray(run.shape, f"V{run.itemsize}", raw, 0, strides)
                self._row_major = number, memoryview(view.tobytes())
            return self._row_major[1]

    def read_objects(self, part: str, *, rank: int) -> dict[str, bytes]:
        """Return the encoded Python values of `part`: all ranks share them."""
        return dict(self._objects.get(part, {}))

    def _missing(self, key: str) -> IntegrityError:
        return IntegrityError(f"{self.where}: file {key} is missing", kind=ErrorKind.MISSING_FILE)
