"""A file before it exists: which bytes come where, made window by window while it is stored.

No more of a file than a few windows is ever in memory, whatever it and its tensors measure. What
`torch.save` writes is drawn here too.
"""

from __future__ import annotations

import math
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch

from dist_ckpt.doors.content import Item, Outgoing
from dist_ckpt.doors.pickling import Call, Name, Outside, pickled
from dist_ckpt.loading.opened import BoxTarget
from dist_ckpt.state.layout import dtype_name
from dist_ckpt.storage.base import Stream
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import ahead

_AHEAD = 2
"""How many windows are read while others are stored."""

WINDOW_BYTES = 16 << 20
"""How much of a file is made at a time: of a source that lies otherwise, two windows read the block
between them. Every element begins and ends in one window: a tensor lies at a multiple of its item,
and so do windows."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that stand at `offset`: of a tensor, or what `make` returns.

    Attributes:
        offset: where in the file.
        nbytes: how many there are.
        item: the tensor; None for other bytes.
        make: returns these; asked once, when all before them was made.
        seen: told of the bytes of the tensor as they are made, in order.
    """

    offset: int
    nbytes: int
    item: Item | None = None
    make: Callable[[], bytes] = bytes
    seen: Callable[[memoryview], None] = field(default=lambda _: None)

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.nbytes


class Image:
    """What a file will be: spans in ascending order, and zeros between them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.nbytes = 0

    def skip_to(self, offset: int) -> None:
        """Let what follows begin at `offset`."""
        self.nbytes = offset

    def add_bytes(self, data: bytes) -> None:
        """Let `data` follow."""
        self.add_late(len(data), lambda: data)

    def add_late(self, nbytes: int, make: Callable[[], bytes]) -> None:
        """Let `nbytes` follow that are known when all before them was made."""
        self._add(Span(self.nbytes, nbytes, make=make))

    def add_tensor(self, item: Item, seen: Callable[[memoryview], None] = lambda _: None) -> None:
        """Let the elements of a tensor follow, at a multiple of the size of one."""
        # What `WINDOW_BYTES` says rests on it: no element is cut by the end of a window.
        assert not self.nbytes % max(1, item.dtype.itemsize)
        self._add(Span(self.nbytes, item.nbytes, item, seen=seen))

    def spans_between(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the spans that have bytes in `start:stop`, in order."""
        # By their ends: a span that began some windows before may reach into this one.
        first = bisect_right(self.spans, start, key=lambda span: span.stop)
        for span in islice(self.spans, first, None):
            if span.offset >= stop:
                return
            yield span

    def _add(self, span: Span) -> None:
        # A tensor without elements stands in the pickle or the header alone.
        if span.nbytes:
            self.spans.append(span)
            self.nbytes = span.stop


@dataclass(frozen=True)
class Drawing:
    """A file to be stored: what draws its image, and where the tensors come from.

    Attributes:
        draw: returns the image, a new one at each call: what it notes of its bytes is of one way
            through them.
        content: the tensors.
    """

    draw: Callable[[], Image]
    content: Outgoing

    @cached_property
    def nbytes(self) -> int:
        """The size of the file."""
        return self.draw().nbytes

    def stream(self, seen: Callable[[memoryview], None] = lambda _: None) -> Stream:
        """Return the file as it can be stored; `seen` is told of each window, in order."""

        def pieces() -> Iterator[memoryview]:
            for window in windows(self.draw(), self.content):
                seen(window)
                yield window

        return Stream(self.nbytes, pieces)


@dataclass(frozen=True, slots=True)
class _Window:
    """One window of a file: where it begins, its memory, and the spans that have bytes in it."""

    start: int
    memory: memoryview
    spans: Sequence[Span]

    def finish(self, late: dict[int, bytes]) -> memoryview:
        """Return its bytes, when those of all windows before were returned.

        Args:
            late: what was made for the window before and goes on in this one.
        """
        start, stop = self.start, self.start + self.memory.nbytes
        for span in self.spans:
            low, high = max(span.offset, start), min(span.stop, stop)
            if span.item is not None:
                # Not where it is read: only the ends of windows come in the order of a checksum.
                span.seen(self.memory[low - start : high - start])
                continue
            # Made once, and kept for the window in which it goes on.
            data = late.pop(span.offset, None) or span.make()
            if span.stop > stop:
                late[span.offset] = data
            here = data[low - span.offset : high - span.offset]
            self.memory[low - start : high - start] = here
        return self.memory


def windows(image: Image, content: Outgoing) -> Iterator[memoryview]:
    """Yield the bytes of `image` in windows, each in memory of its own.

    Raises:
        CheckpointError: a tensor cannot be read.
    """

    def read(start: int) -> _Window:
        memory = aligned_buffer(min(WINDOW_BYTES, image.nbytes - start))
        spans = list(image.spans_between(start, start + memory.nbytes))
        if targets := _targets(spans, start, memory):
            content.fill(targets)
        return _Window(start, memory, spans)

    late: dict[int, bytes] = {}
    # Reads go on while the store takes what was read. Closed by whoever closes this: the store that
    # is read from may be closed after it.
    with closing(ahead(read, range(0, image.nbytes, WINDOW_BYTES), count=_AHEAD)) as found:
        yield from map(partial(_Window.finish, late=late), found)


def _targets(spans: Sequence[Span], start: int, window: memoryview) -> list[BoxTarget]:
    """Return the boxes of tensors that make up `window`, and their places in it."""
    memory = torch.frombuffer(window, dtype=torch.uint8)
    found: list[BoxTarget] = []
    for span in spans:
        if span.item is None:
            continue
        low, high = max(span.offset, start), min(span.stop, start + window.nbytes)
        size = span.item.dtype.itemsize
        at = low - start
        for offsets, sizes in boxes_of_range(
            span.item.shape, (low - span.offset) // size, (high - span.offset) // size
        ):
            end = at + math.prod(sizes) * size
            box = memory[at:end].view(span.item.dtype).view(sizes)
            found.append((span.item.name, offsets, box))
            at = end
    return found


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield boxes, as offsets and sizes, whose elements in order are those of a range.

    Args:
        shape: of a tensor whose last dimension is innermost.
        start: number of the first element.
        stop: one behind that of the last.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row, rest = divmod(start, inner)
    if rest or stop - start < inner:
        # The end of a row, or less than one.
        end = min(stop, (row + 1) * inner)
        for offsets, sizes in boxes_of_range(shape[1:], rest, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        yield from boxes_of_range(shape, end, stop)
        return
    rows = (stop - start) // inner
    # Between two ends whole rows are one box: few boxes, however large the tensor.
    yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from boxes_of_range(shape, start + rows * inner, stop)


# What `torch.save` writes: a zip archive of a pickle, and a record for the memory of each tensor.
#
# The archive is drawn before a byte of a tensor is read. All but the checksums is known then: these
# stand behind the records and in the directory at the end.


_FOLDER = "archive"
_ALIGN_BYTES = 64
# In 32 bits of a zip it says: the true number is in the ZIP64 field (APPNOTE 4.5.3).
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
        # By it `torch.load` swaps the bytes, where the host is of the other order.
        self._add_bytes("byteorder", b"little")
        for number, item in enumerate(items):
            record = self._begin(f"data/{number}", item.nbytes)
            self.image.add_tensor(item, record.seen)
            self._end(record)
        # `PyTorchStreamReader` asks for it; 3 is what `torch.save` writes.
        self._add_bytes("version", b"3\n")
        self._add_directory()

    def _add_bytes(self, name: str, data: bytes) -> None:
        record = self._begin(name, len(data))
        record.seen(memoryview(data))
        self.image.add_bytes(data)
        self._end(record)

    def _begin(self, name: str, nbytes: int) -> ArchiveRecord:
        # From where the archive begins: a `.distcp` file has one behind the other.
        record = ArchiveRecord(f"{_FOLDER}/{name}", self.image.nbytes - self._start, nbytes)
        self._records.append(record)
        path = record.name.encode()
        # Both sizes or neither: a local header must have the two together (APPNOTE 4.5.3).
        extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if record.is_large else b""
        # As torch pads: the memory of a tensor begins at a multiple of 64, from where we do.
        body = self.image.nbytes + 30 + len(path) + len(extra) + 4
        padding = -body % _ALIGN_BYTES
        # "FB": the field by which torch pads, filled with Z as there.
        extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        size = _LARGE if record.is_large else nbytes
        # Stored and not compressed: torch maps the memory of tensors from the file.
        fields = (_needed(record), _CHECKSUM_BEHIND, 0, 0, _DATE, 0, size, size)
        lengths = (len(path), len(extra))
        self.image.add_bytes(struct.pack("<4s5H3I2H", b"PK\3\4", *fields, *lengths) + path + extra)
        return record

    def _end(self, record: ArchiveRecord) -> None:
        # As wide as the header says: of another width, the next record seems to begin elsewhere.
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
        # What the old end cannot count or reach, one of ZIP64 in front of it says.
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
    # In this order, and only those of which the 32 bits say that they are here.
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
        # As torch counts: a dimension without elements has the stride of one with one.
        strides[at] = strides[at + 1] * max(1, item.shape[at + 1])
    elements = item.nbytes // item.dtype.itemsize
    storage = _STORAGES.get(item.dtype)
    hooks = Call(Name("collections", "OrderedDict"), ())
    view = (0, item.shape, tuple(strides), False, hooks)
    # Dtypes that are newer than the typed storages go by v3, as in torch/_tensor.py.
    if storage is not None:
        kind = Name("torch", storage)
        memory = Outside(("storage", kind, str(number), "cpu", elements))
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (memory, *view))
    kind = Name("torch.storage", "UntypedStorage")
    memory = Outside(("storage", kind, str(number), "cpu", item.nbytes))
    dtype = Name("torch", dtype_name(item.dtype))
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), (memory, *view, dtype))


def draw_archive(items: Mapping[str, Item], ties: Sequence[tuple[str, ...]]) -> Callable[[], Image]:
    """Return what draws the file of a dict of tensors; ties share their memory, as they did."""
    # One record for each group: after a load the names share memory again.
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
