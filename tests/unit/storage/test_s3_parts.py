"""How objects are cut for S3, up to the largest that it holds."""

from __future__ import annotations

import asyncio
import base64
import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.storage.multipart import (
    MAX_OBJECT_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    MIB,
    MIN_PART_BYTES,
    Body,
    crc32,
    cut_parts,
    part_bytes,
    spans,
)

sizes = st.one_of(
    st.integers(0, MAX_OBJECT_BYTES),
    st.builds(
        lambda parts, size, off: min(max(parts * size + off, 0), MAX_OBJECT_BYTES),
        st.integers(1, MAX_PARTS + 1),
        st.sampled_from([MIN_PART_BYTES, 16 * MIB, 64 * MIB, 512 * MIB]),
        st.integers(-1, 1),
    ),
)


@given(sizes, st.integers(1, 6 << 30))
def test_parts_are_within_every_limit(nbytes: int, preferred: int) -> None:
    size = part_bytes(nbytes, preferred=preferred)
    assert MIN_PART_BYTES <= size <= MAX_PART_BYTES
    assert -(-nbytes // size) <= MAX_PARTS


@given(sizes, st.integers(MIN_PART_BYTES, MAX_PART_BYTES))
def test_parts_grow_only_where_they_must(nbytes: int, preferred: int) -> None:
    size = part_bytes(nbytes, preferred=preferred)
    if nbytes <= preferred * MAX_PARTS:
        assert size == preferred
    else:
        assert size % MIB == 0
        assert (size - MIB) * MAX_PARTS < nbytes


def test_limits_by_hand() -> None:
    assert part_bytes(0, preferred=1) == 5 * MIB
    assert part_bytes(160_000 * MIB, preferred=16 * MIB) == 16 * MIB
    assert part_bytes(160_000 * MIB + 1, preferred=16 * MIB) == 17 * MIB
    assert part_bytes(MAX_OBJECT_BYTES, preferred=16 * MIB) == 525 * MIB
    with pytest.raises(UsageError, match="more ranks"):
        part_bytes(MAX_OBJECT_BYTES + 1, preferred=16 * MIB)


@given(st.integers(0, 1000), st.integers(1, 300))
def test_spans_cover_everything_once(nbytes: int, size: int) -> None:
    found = spans(nbytes, size)
    assert [byte for start, stop in found for byte in range(start, stop)] == list(range(nbytes))
    assert all(0 < stop - start <= size for start, stop in found)


@given(st.lists(st.binary(max_size=20), max_size=6), st.data())
def test_cut_is_a_slice_of_the_concatenation(buffers: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(buffers)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    views = cut_parts([memoryview(buffer) for buffer in buffers], start, stop)
    assert b"".join(views) == whole[start:stop]


def test_cut_copies_nothing() -> None:
    buffer = bytearray(b"0123456789")
    (view,) = cut_parts([memoryview(buffer)], 2, 5)
    buffer[3] = ord("x")
    assert bytes(view) == b"2x4"


@given(st.lists(st.binary(max_size=20), max_size=4))
def test_crc_is_that_of_the_concatenation(buffers: list[bytes]) -> None:
    expected = zlib.crc32(b"".join(buffers)).to_bytes(4, "big")
    assert crc32([memoryview(buffer) for buffer in buffers]) == base64.b64encode(expected).decode()


class TestBody:
    data = bytes(range(256)) * 4096

    def body(self, progress: list[int]) -> Body:
        views = [memoryview(self.data)[:1000], memoryview(self.data)[1000:]]
        return Body(views, lambda: progress.append(1))

    def test_is_a_file_for_what_signs_requests(self) -> None:
        body = self.body([])
        assert len(body) == len(self.data)
        assert body.read(10) == self.data[:10]
        assert body.tell() == 10
        assert body.read() == self.data[10:]
        assert body.read(5) == b""
        assert body.seek(0, io.SEEK_END) == len(self.data)
        assert body.seek(-3, io.SEEK_CUR) == len(self.data) - 3
        assert body.read() == self.data[-3:]

    def test_is_sent_in_chunks_from_the_begin_each_time(self) -> None:
        progress: list[int] = []
        body = self.body(progress)
        body.seek(500)

        async def send() -> list[memoryview]:
            return [chunk async for chunk in body]

        first, second = asyncio.run(send()), asyncio.run(send())
        assert b"".join(first) == b"".join(second) == self.data
        assert max(chunk.nbytes for chunk in first) <= 256 << 10
        # Before each chunk, and when the connection has taken the last one.
        assert len(progress) == len(first) + len(second) + 2
