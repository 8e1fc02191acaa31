from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format.shard import (
    ALIGN_BYTES,
    DTYPES,
    ShardEntry,
    StoredEntry,
    entry_nbytes,
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
