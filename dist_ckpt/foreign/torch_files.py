"""Where the tensors of a `torch.save` file lie, found without executing what is in it.

Such a file is a zip archive of uncompressed records: a pickle that describes the values, and one
record for the memory of each tensor. The pickle is interpreted by `dist_ckpt.foreign.unpickle`,
which is told the few names that torch writes for tensors and plain containers.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ckpt.errors import CheckpointError, ErrorKind, IncompatibleError, IntegrityError
from dist_ckpt.foreign.stand_ins import Constructor, Unknown
from dist_ckpt.foreign.torch_values import CONSTRUCTORS, KINDS, completed, unknown_in, what_of
from dist_ckpt.foreign.unpickle import unpickle
from dist_ckpt.format.files import DTYPES, itemsize
from dist_ckpt.format.names import INT64_MAX, count_elements
from dist_ckpt.storage.base import Store

_PICKLE_LIMIT_BYTES = 1 << 28
_WINDOW_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 30
_MAX_NAME = 1000
_LOCAL_MAGIC = b"PK\x03\x04"
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
class TorchTensor:
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
class DtypeName:
    """Stands for a dtype, or for a class of memory of that dtype."""

    name: str


class StoredFile:
    """A stored object, or a span of one, as a file that can be sought in."""

    def __init__(self, store: Store, key: str, start: int, nbytes: int) -> None:
        self._raw = _Span(store, key, start, nbytes)

    def open(self) -> io.BufferedReader:
        """Return it opened; little is read at a time, because little of it is looked at."""
        return _Window(self._raw, _WINDOW_BYTES)


class _Window(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        # Memory for all of it is taken before the first byte is read, whatever is claimed.
        if size is not None and size > _PICKLE_LIMIT_BYTES:
            raise OSError(f"{size} bytes to be read at once")
        return super().read(size)


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
        # Not beyond the span: behind it the next archive of the file begins.
        count = max(0, min(len(view), self._nbytes - self._position))
        if count:
            count = self._store.read_into(self._key, self._start + self._position, view[:count])
        self._position += count
        return count


def describe_file(
    store: Store,
    key: str,
    *,
    start: int = 0,
    nbytes: int | None = None,
    instead: Mapping[tuple[str, str], Constructor] | None = None,
    lenient: bool = False,
) -> Any:
    """Return what `torch.save` wrote, with a `TorchTensor` in the place of each tensor.

    Args:
        store: where the file is.
        key: its key.
        start: where in it the archive begins (DCP writes many into one file).
        nbytes: how long the archive is; None for all that follows.
        instead: what to call for some of the names of `CONSTRUCTORS`.
        lenient: whether an `Unknown` stands in the place of what is neither tensor nor plain
            value, and the rest is returned all the same.

    Raises:
        IntegrityError: it is no such archive, or names something that is neither tensor nor plain
            value (where not `lenient`); nothing of that is executed.
        IncompatibleError: it has a tensor whose elements do not fill one run of bytes, or is of the
            form that torch wrote before its version 1.6.
        NotFound: no such key.
    """
    size = store.size(key) - start if nbytes is None else nbytes
    where = f"{key} in {store.url}"
    try:
        with StoredFile(store, key, start, size).open() as file:
            # From protocol 2 on, two bytes are before it: PROTO and its number.
            if _OLD_MAGIC in file.peek(len(_OLD_MAGIC) + 2)[: len(_OLD_MAGIC) + 2]:
                raise IncompatibleError(
                    f"{where} has the form that torch wrote before its version 1.6: load it with "
                    "torch.load(weights_only=True) and save it anew"
                )
            with zipfile.ZipFile(file) as archive:
                return _Archive(archive, file, start, where, lenient=lenient).load(
                    {**CONSTRUCTORS, **(instead or {})}
                )
    # Of the store, or said above; and what says nothing about the file.
    except (CheckpointError, MemoryError):
        raise
    except zipfile.BadZipFile as error:
        said = f"{error}: it was cut short, or is of another kind (pickle, joblib, numpy)"
        raise malformed(where, f"{said}, which what wrote it can read") from error
    # What a zip file and a pickle stream make of their operands is chosen by whoever wrote them.
    except Exception as error:
        raise malformed(where, str(error)) from error


class _Archive:
    def __init__(
        self,
        archive: zipfile.ZipFile,
        file: io.BufferedReader,
        start: int,
        where: str,
        *,
        lenient: bool,
    ) -> None:
        self._lenient = lenient
        self._archive, self._file, self._start, self._where = archive, file, start, where

    def load(self, constructors: Mapping[tuple[str, str], Constructor]) -> Any:
        self._constructors = constructors
        names = self._archive.namelist()
        # Readers differ in which of the two they take.
        if len(set(names)) != len(names):
            raise ValueError("it has two records of one name")
        found = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise ValueError(f"it has {len(found)} descriptions of its values")
        self._folder = found[0].rpartition("/")[0]
        order = f"{self._folder}/byteorder"
        if order in names and self._read(order) != b"little":
            raise IncompatibleError(f"{self._where} was written on a big-endian machine")
        value = completed(unpickle(self._read(found[0]), self._named, refer=_storage_of))
        unknown = None if self._lenient else unknown_in(value)
        if unknown is not None:
            raise ValueError(what_of(unknown))
        return value

    def _read(self, record: str) -> bytes:
        """Return the bytes of a record, which are what the file has: none are made out of few."""
        info = self._stored(record)
        if info.file_size > _PICKLE_LIMIT_BYTES:
            raise ValueError("its description is too large to be one")
        self._file.seek(self._data_start(info) - self._start)
        data = self._file.read(info.file_size)
        if len(data) != info.file_size:
            raise ValueError(f"it ends inside of {record}")
        return data

    def _stored(self, record: str) -> zipfile.ZipInfo:
        info = self._archive.getinfo(record)
        plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if not plain or info.compress_size != info.file_size:
            raise ValueError(f"{record} in it is compressed or encrypted")
        return info

    def _named(self, module: str, name: str) -> object:
        """Return what stands for a name that torch writes for tensors and plain values."""
        # A stream may write a name once and refer to it again and again, and each is copied.
        if len(module) + len(name) > _MAX_NAME:
            raise ValueError("it refers to a name that is too long to be one")
        # Protocol 2, which torch writes, has the names of Python 2.
        known = self._constructors.get((module.replace("builtins", "__builtin__"), name))
        if known is not None:
            return known
        kind = KINDS.get((module, name))
        if kind is not None:
            return kind
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return Constructor(self._tensor)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return Constructor(self._typed_tensor)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return DtypeName(_STORAGES[name])
        if module == "torch" and name in DTYPES:
            return DtypeName(name)
        unknown = Unknown(f"{module}.{name}")
        if not self._lenient:
            raise ValueError(what_of(unknown))
        return unknown

    def _typed_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any
    ) -> TorchTensor | Unknown:
        # Memory without a type of its own; the dtype follows after two flags of autograd.
        dtype = more[2]
        if isinstance(dtype, Unknown):
            return dtype
        return self._tensor(_Storage(storage.record, dtype.name), offset, size, stride)

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
    ) -> TorchTensor | Unknown:
        """Return where the elements of a view of `storage` lie."""
        if isinstance(storage, Unknown):
            return storage
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor is in no memory")
        # In Python integers, and few of them: sizes are whatever the file claims.
        elements = count_elements(size)
        if type(offset) is not int or len(stride) != len(size):
            raise ValueError("a tensor lies nowhere in its memory")
        if not all(type(step) is int and 0 <= step <= INT64_MAX for step in stride):
            raise ValueError("a tensor has strides that cannot be")
        strides = _normal(size, stride)
        if elements and not _is_dense(size, strides):
            raise IncompatibleError(
                f"{self._where} holds a tensor of shape {list(size)} and strides {list(stride)}, "
                "whose elements do not fill one run of bytes: save a contiguous clone of it"
            )
        info = self._stored(f"{self._folder}/data/{storage.record}")
        item = itemsize(storage.dtype)
        if offset < 0 or (offset + elements) * item > info.file_size:
            raise ValueError("a tensor is larger than its memory")
        start = self._data_start(info) + offset * item
        row_major = not elements or strides == _normal(size, _row_major(size))
        return TorchTensor(storage.dtype, tuple(size), start, () if row_major else strides)

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        # The local header may have other extra fields than the directory: torch aligns by them.
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        if not header.startswith(_LOCAL_MAGIC):
            raise ValueError("a record is not where its directory says")
        names, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return self._start + info.header_offset + _LOCAL_HEADER_BYTES + names + extra


def _storage_of(saved: Any) -> _Storage | Unknown:
    """Return what a reference to the memory of a tensor stands for."""
    kind, dtype, record = saved[:3]
    if isinstance(dtype, Unknown):
        return dtype
    # One of `data/`, and nothing else in the archive.
    is_record = type(record) is str and "/" not in record
    if kind != "storage" or not isinstance(dtype, DtypeName) or not is_record:
        raise ValueError("it refers to something that is no memory of a tensor")
    return _Storage(record, dtype.name)


def _row_major(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(size[at + 1 :]) for at in range(len(size)))


def _normal(size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, zero where a dimension has one element and never takes a step."""
    return tuple(step if extent > 1 else 0 for extent, step in zip(size, stride, strict=True))


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether the elements fill one run of memory, in whatever order of the dimensions."""
    filled = 1
    # From the innermost outwards: each step is what all dimensions inside of it fill.
    for step, extent in sorted(zip(stride, size, strict=True)):
        if extent > 1 and step != filled:
            return False
        filled *= extent
    return True


def malformed(where: str, problem: str) -> IntegrityError:
    """Return the error for a file that is not what `torch.save` writes of tensors and values."""
    return IntegrityError(
        f"{where} cannot be read as a torch.save file: {problem}", kind=ErrorKind.MALFORMED
    )
