"""Where the tensors of a `torch.save` file lie, found without executing what is in it.

Such a file is a zip archive of uncompressed records: a pickle that describes the values, and one
record for the memory of each tensor. The pickle is read by an unpickler that knows the few names
torch writes for tensors and plain containers, and calls nothing else.
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: TID251 - only to be restricted: see _Unpickler
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ckpt.errors import CheckpointError, ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.format.pickle_guard import check_pickle
from dist_ckpt.format.shard import DTYPES, itemsize
from dist_ckpt.storage.base import Store

_PICKLE_LIMIT_BYTES = 1 << 28
_WINDOW_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 30
# The pickled number that files of before the archives begin with, by every protocol up to 5.
_OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the pickle describes it.

    Attributes:
        dtype: as torch names it without "torch.".
        shape: in elements.
        offset: where its bytes begin, from the start of the file.
        strides: in elements, where the last dimension is not innermost (transposed tensors, images
            with their channels last); empty elsewhere. The elements still fill one run of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: str


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _Device:
    kind: str
    index: int | None = None


class StoredFile:
    """A stored object, or a span of one, as a file that can be sought in."""

    def __init__(self, store: Store, key: str, start: int, nbytes: int) -> None:
        self._raw = _Span(store, key, start, nbytes)

    def open(self) -> io.BufferedReader:
        """Return it opened; little is read at a time, because little of it is looked at."""
        return io.BufferedReader(self._raw, _WINDOW_BYTES)


class _Span(io.RawIOBase):
    def __init__(self, store: Store, key: str, start: int, nbytes: int) -> None:
        self._store, self._key, self._start, self._nbytes = store, key, start, nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError(f"position {base + offset} of a file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._nbytes - self._position))
        if count:
            count = self._store.read_into(self._key, self._start + self._position, view[:count])
        self._position += count
        return count


def describe(store: Store, key: str, *, start: int = 0, nbytes: int | None = None) -> Any:
    """Return what `torch.save` wrote, with a `StoredTensor` in the place of each tensor.

    Args:
        store: where the file is.
        key: its key.
        start: where in it the archive begins (DCP writes many into one file).
        nbytes: how long the archive is; None for all that follows.

    Raises:
        IntegrityError: it is no such archive, or names something that is neither tensor nor plain
            value; nothing of that is executed.
        IncompatibleError: it has a tensor whose elements do not fill one run of bytes, or is of the
            form that torch wrote before its version 1.6.
        NotFound: no such key.
    """
    size = store.size(key) - start if nbytes is None else nbytes
    where = f"{key} in {store.url}"
    try:
        with StoredFile(store, key, start, size).open() as file:
            if _OLD_MAGIC in file.peek(len(_OLD_MAGIC) + 2)[: len(_OLD_MAGIC) + 2]:
                raise IncompatibleError(
                    f"{where} has the form that torch wrote before its version 1.6: load it with "
                    "torch.load(weights_only=True) and save it anew"
                )
            with zipfile.ZipFile(file) as archive:
                return _Archive(archive, file, start, where).load()
    except CheckpointError:
        raise  # of the store, or said above; some are OSErrors, too
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, OSError) as error:
        raise _malformed(where, error) from error
    # What a pickle stream makes of its operands is chosen by whoever wrote it.
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise _malformed(where, error) from error


class _Archive:
    def __init__(
        self, archive: zipfile.ZipFile, file: io.BufferedReader, start: int, where: str
    ) -> None:
        self._archive, self._file, self._start, self._where = archive, file, start, where

    def load(self) -> Any:
        (record,) = (n for n in self._archive.namelist() if n.rpartition("/")[2] == "data.pkl")
        self._folder = record.rpartition("/")[0]
        if self._archive.getinfo(record).file_size > _PICKLE_LIMIT_BYTES:
            raise ValueError("its description is too large to be one")
        order = f"{self._folder}/byteorder"
        if order in self._archive.namelist() and self._archive.read(order) != b"little":
            raise IncompatibleError(f"{self._where} was written on a big-endian machine")
        data = self._archive.read(record)
        check_pickle(data)
        return _Unpickler(io.BytesIO(data), self).load()

    def tensor(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> StoredTensor:
        """Return where the elements of a view of `storage` lie."""
        elements = math.prod(size)
        strides = _normal(size, stride)
        if elements and not _is_dense(size, strides):
            raise IncompatibleError(
                f"{self._where} holds a tensor of shape {list(size)} and strides {list(stride)}, "
                "whose elements do not fill one run of bytes: save a contiguous clone of it"
            )
        info = self._archive.getinfo(f"{self._folder}/data/{storage.record}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are compressed")
        item = itemsize(storage.dtype)
        # In Python integers: sizes are whatever the file claims.
        if offset < 0 or (offset + elements) * item > info.file_size:
            raise ValueError("a tensor is larger than its memory")
        start = self._data_start(info) + offset * item
        row_major = not elements or strides == _normal(size, _row_major(size))
        return StoredTensor(storage.dtype, size, start, () if row_major else strides)

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        # The local header may have other extra fields than the directory: torch aligns by them.
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        names, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return self._start + info.header_offset + _LOCAL_HEADER_BYTES + names + extra


class _Unpickler(pickle.Unpickler):
    """Knows the names that torch writes for tensors and plain values, and no other."""

    def __init__(self, data: io.BytesIO, archive: _Archive) -> None:
        super().__init__(data)
        self._archive = archive
        self._known: dict[tuple[str, str], Callable[..., Any] | type] = {
            ("collections", "OrderedDict"): OrderedDict,
            # Protocol 2, which torch writes, has the names of Python 2.
            ("__builtin__", "set"): set,
            ("__builtin__", "complex"): complex,
            ("_codecs", "encode"): _bytes_of,
            ("torch", "device"): _Device,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and name in DTYPES:
            return _Dtype(name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which is neither a tensor nor a plain value"
        )

    def persistent_load(self, saved: Any) -> _Storage:
        kind, storage, record = saved[:3]
        if kind != "storage" or not isinstance(storage, _Dtype) or "/" in str(record):
            raise pickle.UnpicklingError("it refers to something that is no memory of a tensor")
        return _Storage(str(record), storage.name)

    def _tensor(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *_: Any,
    ) -> StoredTensor:
        return self._archive.tensor(storage, offset, tuple(size), tuple(stride))

    def _typed_tensor(
        self, storage: _Storage, offset: int, size: Any, stride: Any, *more: Any
    ) -> Any:
        # Memory without a type of its own; the dtype follows after two flags of autograd.
        dtype = more[2]
        return self._tensor(_Storage(storage.record, dtype.name), offset, size, stride)


def _bytes_of(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 writes as text, one character for each."""
    if encoding != "latin1":
        raise ValueError(f"it has bytes encoded as {encoding}")
    return text.encode(encoding)


def _row_major(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(size[at + 1 :]) for at in range(len(size)))


def _normal(size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, zero where a dimension has one element and never takes a step."""
    return tuple(step if extent > 1 else 0 for extent, step in zip(size, stride, strict=True))


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether the elements fill one run of memory, in whatever order of the dimensions."""
    filled = 1
    for step, extent in sorted(zip(stride, size, strict=True)):
        if extent > 1 and step != filled:
            return False
        filled *= extent
    return True


def _malformed(where: str, error: BaseException) -> IntegrityError:
    return IntegrityError(
        f"{where} cannot be read as a torch.save file: {error}", kind=ErrorKind.MALFORMED
    )
