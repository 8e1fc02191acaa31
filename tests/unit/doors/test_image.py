"""Files that are made window by window."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.doors import image
from dist_ckpt.doors.content import Item
from dist_ckpt.doors.image import Drawing, Image, boxes_of_range
from dist_ckpt.doors.pickling import pickled
from dist_ckpt.errors import IntegrityError
from dist_ckpt.loading.opened import BoxTarget


class Numbers:
    """Tensors whose elements count, as something to be read."""

    def __init__(self, items: Sequence[Item], *, broken: str = "") -> None:
        self.items = {item.name: item for item in items}
        self.ties: Sequence[tuple[str, ...]] = ()
        self.broken = broken

    def whole(self, name: str) -> torch.Tensor:
        item = self.items[name]
        return torch.arange(math.prod(item.shape)).to(item.dtype).view(item.shape)

    def fill(self, boxes: Sequence[BoxTarget]) -> None:
        for name, offsets, memory in boxes:
            if name == self.broken:
                raise IntegrityError(f"{name} is damaged")
            slices = [slice(o, o + n) for o, n in zip(offsets, memory.shape, strict=True)]
            memory.copy_(self.whole(name)[tuple(slices)])


@given(
    st.lists(st.integers(1, 4), max_size=4),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_the_boxes_of_a_range_are_the_range(shape: list[int], start: int, stop: int) -> None:
    count = math.prod(shape)
    start, stop = sorted((start % (count + 1), stop % (count + 1)))
    whole = torch.arange(count).view(shape)
    found: list[int] = []
    for offsets, sizes in boxes_of_range(shape, start, stop):
        slices = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        found += whole[slices].flatten().tolist()
    assert found == list(range(start, stop))


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(image, "WINDOW_BYTES", 64)
    return 64


def test_windows_join_to_the_file_whatever_lies_across_their_ends(small_windows: int) -> None:
    items = [Item("a", torch.float32, (7, 13)), Item("b", torch.int64, (3, 2, 5))]
    numbers = Numbers(items)
    seen: list[bytes] = []

    def draw() -> Image:
        drawn = Image()
        drawn.add_bytes(b"h" * 100)
        drawn.add_tensor(items[0])
        drawn.skip_to(drawn.nbytes + -drawn.nbytes % 8)
        drawn.add_tensor(items[1], lambda data: seen.append(bytes(data)))
        drawn.add_late(90, lambda: b"".join(seen)[:90])
        return drawn

    drawing = Drawing(draw, numbers)
    for _ in range(2):  # a put may begin anew
        seen.clear()
        pieces = list(drawing.stream())
        assert {piece.nbytes for piece in pieces[:-1]} == {small_windows}
        a, b = (numbers.whole(name).numpy().tobytes() for name in "ab")
        head = b"h" * 100 + a
        head += bytes(-len(head) % 8)
        assert b"".join(pieces) == head + b + b[:90]


def test_what_cannot_be_read_ends_the_file(small_windows: int) -> None:
    items = [Item("a", torch.float32, (64,)), Item("b", torch.float32, (64,))]

    def draw() -> Image:
        drawn = Image()
        for item in items:
            drawn.add_tensor(item)
        return drawn

    with pytest.raises(IntegrityError, match="b is damaged"):
        list(Drawing(draw, Numbers(items, broken="b")).stream())


def test_archives_over_four_gib_are_read_by_zip_tools() -> None:
    record = image.ArchiveRecord("archive/data/0", 5 << 30, 6 << 30, 7)
    entry = image.directory_entry(record)
    end = b"PK\5\6" + bytes(4) + b"\1\0\1\0" + len(entry).to_bytes(4, "little") + bytes(6)
    (info,) = zipfile.ZipFile(BytesIO(entry + end)).infolist()
    assert (info.header_offset, info.file_size, info.compress_size, info.CRC) == (
        5 << 30,
        6 << 30,
        6 << 30,
        7,
    )


def test_only_what_is_known_is_pickled() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace"):
        pickled({"a": [SimpleNamespace()]})
