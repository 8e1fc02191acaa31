"""What `torch.save` writes: a zip archive of a pickle, and a record for the memory of each tensor.

The archive is drawn before a byte of a tensor is read. All but the checksums is known then: these
stand behind the records and in the directory at the end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ckpt.doors.content import Item
from dist_ckpt.doors.image import Image
from dist_ckpt.doors.pickling import Call, Name, Outside, pickled
from dist_ckpt.state.layout import dtype_name

_FOLDER = "archive"
_ALIGN_BYTES = 64
_LARGE = 0xFFFFFFFF
# The checksum stands behind the record.
_CHECKSUM_BEHIND = 0x08
_DATE = 0x21  # the first day that a zip archive knows
_VERSION, _ZIP64 = 20, 45

_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}


@dataclass
class ArchiveRecord:
    """A file in the archive.

    Attributes:
        name: its path there.
        offset: where it begins.
        nbytes: its size.
        checksum: the CRC-32 of what was seen of it.
    """

    name: str
    offset: int
    nbytes: int
    checksum: int = 0

    def seen(self, data: memoryview) -> None:
        """Count `data` in, which comes next."""
        self.checksum = zlib.crc32(data, self.checksum)

    @property
    def is_large(self) -> bool:
        """Whether its size needs a field of 64 bits."""
        return self.nbytes >= _LARGE


@dataclass
class Archive:
    """An archive in `image`, from where that ends now.

    Args:
        image: what it is added to.
    """

    image: Image
    _records: list[ArchiveRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.image.nbytes

    def add(self, value: Any, items: Sequence[Item]) -> None:
        """Add the pickle of `value`, the memory of `items`, which it refers to, and the end.

        Args:
            value: see `dist_ckpt.doors.pickling`; of tensors what `whole_storage` returns.
            items: number `i` of them is the storage `i`.
        """
        self._add_bytes("data.pkl", pickled(value))
        self._add_bytes("byteorder", b"little")
        for number, item in enumerate(items):
            record = self._begin(f"data/{number}", item.nbytes)
            self.image.add_tensor(item, record.seen)
            self._end(record)
        self._add_bytes("version", b"3\n")
        self._add_directory()

    def _add_bytes(self, name: str, data: bytes) -> None:
        record = self._begin(name, len(data))
        record.seen(memoryview(data))
        self.image.add_bytes(data)
        self._end(record)

    def _begin(self, name: str, nbytes: int) -> ArchiveRecord:
        record = ArchiveRecord(f"{_FOLDER}/{name}", self.image.nbytes - self._start, nbytes)
        self._records.append(record)
        path = record.name.encode()
        extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if record.is_large else b""
        # As torch pads: the memory of a tensor begins at a multiple of 64, from where we do.
        body = self.image.nbytes + 30 + len(path) + len(extra) + 4
        padding = -body % _ALIGN_BYTES
        extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        size = _LARGE if record.is_large else nbytes
        fields = (_needed(record), _CHECKSUM_BEHIND, 0, 0, _DATE, 0, size, size)
        lengths = (len(path), len(extra))
        self.image.add_bytes(struct.pack("<4s5H3I2H", b"PK\3\4", *fields, *lengths) + path + extra)
        return record

    def _end(self, record: ArchiveRecord) -> None:
        form = "<4sIQQ" if record.is_large else "<4sIII"
        sizes = (record.nbytes, record.nbytes)
        self.image.add_late(
            struct.calcsize(form),
            lambda: struct.pack(form, b"PK\7\x08", record.checksum, *sizes),
        )

    def _add_directory(self) -> None:
        start = self.image.nbytes - self._start
        # As long with the checksums as without.
        nbytes = len(self._directory())
        self.image.add_late(nbytes, self._directory)
        count = len(self._records)
        if start + nbytes >= _LARGE or count >= 0xFFFF:
            behind = start + nbytes
            many = (44, _ZIP64, _ZIP64, 0, 0, count, count, nbytes, start)
            self.image.add_bytes(struct.pack("<4sQ2H2I4Q", b"PK\6\6", *many))
            self.image.add_bytes(struct.pack("<4sIQI", b"PK\6\7", 0, behind, 1))
        counts = (min(count, 0xFFFF), min(count, 0xFFFF))
        ends = (min(nbytes, _LARGE), min(start, _LARGE))
        self.image.add_bytes(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *counts, *ends, 0))

    def _directory(self) -> bytes:
        return b"".join(map(directory_entry, self._records))


def directory_entry(record: ArchiveRecord) -> bytes:
    """Return what the directory at the end of the archive says of a file."""
    path = record.name.encode()
    wide = [record.nbytes, record.nbytes] if record.is_large else []
    wide += [record.offset] if record.offset >= _LARGE else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size = _LARGE if record.is_large else record.nbytes
    fields = (_needed(record), _CHECKSUM_BEHIND, 0, 0, _DATE, record.checksum, size, size)
    lengths = (len(path), len(extra), 0, 0, 0)
    head = struct.pack("<4s6H3I5H", b"PK\1\2", _ZIP64, *fields, *lengths)
    return head + struct.pack("<2I", 0, min(record.offset, _LARGE)) + path + extra


def _needed(record: ArchiveRecord) -> int:
    return _ZIP64 if record.is_large or record.offset >= _LARGE else _VERSION


def whole_storage(item: Item, number: int) -> Call:
    """Return how a pickle says that a tensor is all of the storage `number`."""
    strides = [1] * len(item.shape)
    for at in range(len(item.shape) - 2, -1, -1):
        strides[at] = strides[at + 1] * max(1, item.shape[at + 1])
    elements = item.nbytes // item.dtype.itemsize
    storage = _STORAGES.get(item.dtype)
    hooks = Call(Name("collections", "OrderedDict"), ())
    view = (0, item.shape, tuple(strides), False, hooks)
    if storage is not None:
        kind = Name("torch", storage)
        memory = Outside(("storage", kind, str(number), "cpu", elements))
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (memory, *view))
    kind = Name("torch.storage", "UntypedStorage")
    memory = Outside(("storage", kind, str(number), "cpu", item.nbytes))
    dtype = Name("torch", dtype_name(item.dtype))
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), (memory, *view, dtype))


def draw_file(items: Mapping[str, Item], ties: Sequence[tuple[str, ...]]) -> Callable[[], Image]:
    """Return what draws the file of a dict of tensors; ties share their memory, as they did."""
    first = {name: group[0] for group in ties for name in group}
    stored = [item for name, item in items.items() if first.get(name, name) == name]
    numbers = {item.name: number for number, item in enumerate(stored)}
    value = {
        name: whole_storage(item, numbers[first.get(name, name)]) for name, item in items.items()
    }

    def draw() -> Image:
        image = Image()
        Archive(image).add(value, stored)
        return image

    return draw
