from __future__ import annotations

import array
import json
import math
import struct
from itertools import pairwise

import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format import files
from dist_ckpt.format.files import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    DTYPES,
    ShardEntry,
    StoredEntry,
    block_count,
    block_digests,
    bytes_digest,
    entry_nbytes,
    file_digest,
    header_nbytes,
    itemsize,
    layout,
    parse_header,
)

ENTRIES = st.lists(
    st.builds(
        ShardEntry,
        st.text(alphabet='a#0,"\\ä\n', max_size=4),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda entry: entry.name,
)


def shard(header: dict[str, object], data: bytes = b"", align: int = ALIGN_BYTES) -> bytes:
    """A shard file made by hand."""
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text + data


def entry(code: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": code, "shape": shape, "data_offsets": [begin, end]}


@given(ENTRIES, st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_a_layout_is_a_safetensors_file(
    entries: list[ShardEntry], metadata: dict[str, str]
) -> None:
    plan = layout(entries, metadata)
    data = bytearray(plan.nbytes)
    data[: len(plan.header)] = plan.header
    spans = []
    for i, (item, offset) in enumerate(zip(entries, plan.offsets, strict=True)):
        assert offset % itemsize(item.dtype) == 0
        stop = offset + entry_nbytes(item)
        data[offset:stop] = bytes([i + 1]) * (stop - offset)
        spans.append((offset, stop))
    assert len(plan.header) % ALIGN_BYTES == 0
    assert sum(stop - start for start, stop in spans) == plan.nbytes - len(plan.header)
    stored = dict(safetensors.deserialize(bytes(data)))  # type: ignore[no-untyped-call]
    assert stored.keys() == {item.name for item in entries}
    for i, item in enumerate(entries):
        found = stored[item.name]
        assert bytes(found["data"]) == bytes([i + 1]) * entry_nbytes(item)
        raw = DTYPES[item.dtype][0] == "U8" and item.dtype != "uint8"
        assert tuple(found["shape"]) == item.shape + ((itemsize(item.dtype),) if raw else ())
    header = parse_header(bytes(data), plan.nbytes)
    assert header.metadata == metadata
    assert header.nbytes == header_nbytes(plan.header[:8], plan.nbytes) == len(plan.header)
    assert {(e.name, e.offset, e.nbytes) for e in header.entries} == {
        (item.name, offset, entry_nbytes(item))
        for item, offset in zip(entries, plan.offsets, strict=True)
    }


def test_the_order_of_the_entries_does_not_change_the_file() -> None:
    entries = [ShardEntry("b", "int8", (3,)), ShardEntry("a", "float64", (2,))]
    forth, back = layout(entries, {}), layout(entries[::-1], {})
    assert forth.header == back.header
    assert forth.offsets == (ALIGN_BYTES + 16, ALIGN_BYTES)
    assert forth.offsets == back.offsets[::-1]
    assert parse_header(forth.header, forth.nbytes).entries == (
        StoredEntry("a", "F64", (2,), ALIGN_BYTES, 16),
        StoredEntry("b", "I8", (3,), ALIGN_BYTES + 16, 3),
    )


def test_a_shard_of_nothing_is_one_page() -> None:
    plan = layout([], {})
    assert (len(plan.header), plan.nbytes, plan.offsets) == (ALIGN_BYTES, ALIGN_BYTES, ())
    assert parse_header(plan.header, plan.nbytes).entries == ()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_as_wide_as_torch_says_and_loads(dtype: str) -> None:
    kind = getattr(torch, dtype, None)
    if kind is None:
        pytest.skip("this torch has no such dtype")
    assert itemsize(dtype) == kind.itemsize
    plan = layout([ShardEntry("x", dtype, (2, 3))], {})
    data = plan.header + bytes(range(plan.nbytes - len(plan.header)))
    loaded = safetensors.torch.load(data)["x"]
    bits = loaded.view(torch.uint8).flatten().tolist()
    assert bits == list(range(6 * itemsize(dtype)))
    if loaded.dtype != kind:
        assert loaded.dtype == torch.uint8
        assert loaded.shape == (2, 3, itemsize(dtype))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ShardEntry("x", "int8", ())] * 2, "same name"),
        ([ShardEntry("__metadata__", "int8", ())], "rename"),
        ([ShardEntry("x", "quint8", ())], "quint8"),
        ([ShardEntry("\ud800", "int8", ())], "Unicode"),
        ([ShardEntry("x" * 100_000_000, "int8", ())], "several parts"),
    ],
)
def test_what_no_shard_can_hold_is_refused(entries: list[ShardEntry], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout(entries, {})


@pytest.mark.parametrize(
    "data",
    [
        shard({"x": entry("F32", [2], 0, 7)}, bytes(7)),
        shard({"x": entry("F32", [2], 4, 12)}, bytes(12)),
        shard({"x": entry("F32", [2], 0, 8), "y": entry("U8", [8], 0, 8)}, bytes(8)),
        shard({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, bytes(3)),
        shard({"x": entry("F99", [2], 0, 8)}, bytes(8)),
        shard({"x": entry("F32", [-1, -2], 0, 8)}, bytes(8)),
        shard({"x": entry("U8", [2**64], 0, 8)}, bytes(8)),
        shard({"x": entry("U8", [2**62] * 60, 0, 8)}, bytes(8)),
        shard({"x": entry("U8", [1] * 66, 0, 1)}, bytes(1)),
        shard({"x": {**entry("U8", [1], 0, 1), "code": "exec"}}, bytes(1)),
        shard({"x": {"dtype": "U8"}}, bytes(1)),
        shard({"x": entry("U8", [2], 0, 2)}, bytes(1)),
        shard({"x": entry("U8", [1], 0, 1)}, bytes(2)),
        shard({"__metadata__": {"a": 1}}),
        shard({"x": entry("U8", [1], 0, 1)}, bytes(1), align=8),
        struct.pack("<Q", 4088) + b"[" * 4088,
        struct.pack("<Q", 4088) + b'{"x":' * 800 + b" " * 88,
        struct.pack("<Q", 4088) + b"\xff" * 4088,
        struct.pack("<Q", 2**63) + bytes(4088),
        struct.pack("<Q", 4088) + bytes(100),
        b"short",
        b"",
    ],
)
def test_a_bad_header_is_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_header(data, len(data))
    assert caught.value.kind in (ErrorKind.MALFORMED, ErrorKind.TRUNCATED)


def test_a_header_that_was_not_read_whole_is_an_integrity_error() -> None:
    plan = layout([ShardEntry("x", "int8", (9,))], {})
    with pytest.raises(IntegrityError, match="cut short"):
        parse_header(plan.header[:-1], plan.nbytes)


@given(st.data())
def test_a_changed_byte_is_noticed_or_harmless(data: st.DataObject) -> None:
    entries = [ShardEntry("w", "float32", (3, 5)), ShardEntry("b", "bool", (7,))]
    plan = layout(entries, {"step": "1"})
    used = plan.header.rstrip()
    header = bytearray(plan.header)
    header[data.draw(st.integers(0, len(used)))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse_header(bytes(header), plan.nbytes)
    except IntegrityError:
        return
    stored = [(item.offset, item.nbytes) for item in parsed.entries]
    assert sum(nbytes for _, nbytes in stored) == plan.nbytes - len(plan.header)
    assert all(math.prod(item.shape) <= item.nbytes for item in parsed.entries)


# Digests of blocks.


def test_each_block_has_its_digest() -> None:
    data = bytes(range(256)) * (BLOCK_BYTES // 128) + b"tail"
    expected = [
        xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES])
        for start in (0, BLOCK_BYTES, 2 * BLOCK_BYTES)
    ]
    digests = block_digests(data)
    assert digests == b"".join(value.to_bytes(8, "big") for value in expected)
    assert file_digest(digests) == f"{xxhash.xxh3_64_intdigest(digests):016x}"


@pytest.mark.parametrize(
    ("nbytes", "blocks"),
    [(0, 0), (1, 1), (BLOCK_BYTES - 1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2)],
)
def test_blocks_are_counted(nbytes: int, blocks: int) -> None:
    assert block_count(nbytes) == blocks
    assert len(block_digests(bytes(nbytes))) == 8 * blocks


def test_whole_blocks_may_be_digested_apart() -> None:
    data = b"ab" * BLOCK_BYTES
    apart = block_digests(data[:BLOCK_BYTES]) + block_digests(data[BLOCK_BYTES:])
    assert apart == block_digests(data)


@given(st.binary(max_size=64), st.lists(st.integers(0, 64), max_size=5))
def test_buffers_are_digested_as_one(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[start:stop] for start, stop in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", 8)
        blocks = [data[start : start + 8] for start in range(0, len(data), 8)]
        expected = b"".join(xxhash.xxh3_64_digest(block) for block in blocks)
        assert block_digests(*parts) == expected


@given(st.binary(max_size=64))
def test_every_kind_of_buffer_has_the_digest_of_its_bytes(data: bytes) -> None:
    assert block_digests(bytearray(data)) == block_digests(memoryview(data)) == block_digests(data)
    assert bytes_digest(bytearray(data)) == bytes_digest(data) == xxhash.xxh3_64_hexdigest(data)


def test_elements_wider_than_a_byte_are_digested_as_bytes() -> None:
    values = array.array("d", [1.0, 2.0])
    assert block_digests(memoryview(values)) == block_digests(values.tobytes())


def test_a_fraction_of_a_digest_is_refused() -> None:
    with pytest.raises(UsageError, match="9 bytes"):
        file_digest(bytes(9))


def test_digests_of_format_1_never_change() -> None:
    assert bytes_digest(b"") == "2d06800538d394c2"
    assert file_digest(block_digests(b"dist_ckpt")) == file_digest(
        bytes.fromhex(bytes_digest(b"dist_ckpt"))
    )
