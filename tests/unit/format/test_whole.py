from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format.files import (
    BLOCK_BYTES,
    DTYPES,
    FileEntry,
    block_count,
    bytes_digest,
    file_digest,
)
from dist_ckpt.format.index import Box, ChunkTable, Index, ObjectEntry, TensorEntry, split_rows
from dist_ckpt.format.whole import decode, encode

Row = tuple[int, int, int, Box]

FILE_BYTES = 3 * BLOCK_BYTES + 5


def file_entry(name: str = "model.r00000.safetensors", nbytes: int = FILE_BYTES) -> FileEntry:
    blocks = bytes(range(8)) * block_count(nbytes)
    return FileEntry(name, nbytes, file_digest(blocks), blocks)


def small() -> Index:
    """A checkpoint of two files: a matrix in halves, a scalar, a tensor without elements."""
    files = [file_entry(), file_entry("extra.r00001.safetensors", 4100)]
    tensors = [
        TensorEntry("model", "w", "float32", (4, 3)),
        TensorEntry("model", "t", "int64", ()),
        TensorEntry("optimizer", "w", "bfloat16", (0, 7)),
    ]
    objects = [
        ObjectEntry("rng", 0, 1, 4096, 2, bytes_digest(b"{}")),
        ObjectEntry("rng", 1, 1, 4098, 2, bytes_digest(b"{}")),
        ObjectEntry("notes", None, 1, 4100, 0, bytes_digest(b"")),
    ]
    rows = [
        (2, 0, FILE_BYTES, Box((0, 0), (0, 7))),
        (0, 0, 4120, Box((2, 0), (2, 3))),
        (0, 0, 4096, Box((0, 0), (2, 3))),
        (1, 0, 4144, Box((), ())),
    ]
    return Index.build(files, tensors, objects, rows)


def wire(**changes: Any) -> bytes:
    """The small index with some of its fields replaced, encoded without any check."""
    fields = msgspec.msgpack.decode(encode(small()))
    return msgspec.msgpack.encode({**fields, **changes})


def column(kind: str, *values: int) -> bytes:
    return np.array(values, kind).tobytes()


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    tensors: list[TensorEntry] = []
    rows: list[Row] = []
    for i in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        tensors.append(TensorEntry("model", f"t{i}{draw(st.text(max_size=2))}", dtype, shape))
        whole = Box((0,) * len(shape), shape)
        for piece in split_rows(whole, draw(st.integers(1, 4))):
            file, offset = draw(st.integers(0, 1)), draw(st.integers(0, 9000))
            chunks = split_rows(piece, draw(st.integers(1, 2)))
            rows += [(i, file, offset, chunk) for chunk in chunks]
    files = [file_entry(), file_entry("extra.r00001.safetensors", 20000)]
    return Index.build(files, tensors, [], draw(st.permutations(rows)))


@given(indexes())
def test_what_is_encoded_is_decoded(index: Index) -> None:
    decoded = decode(encode(index))
    assert decoded == index
    assert encode(decoded) == encode(index)


@given(indexes())
def test_the_chunks_of_a_tensor_are_its_rows(index: Index) -> None:
    total = 0
    for number, tensor in enumerate(index.tensors):
        rows = index.chunks_of(number)
        ndim = len(tensor.shape)
        assert rows.starts.shape == rows.sizes.shape == (len(rows.file), ndim)
        assert int(rows.sizes.prod(axis=1).sum()) == math.prod(tensor.shape)
        assert rows.starts.tolist() == sorted(rows.starts.tolist())
        total += len(rows.file)
    assert total == len(index.chunks.tensor)


def test_the_chunks_of_the_small_index() -> None:
    index = decode(encode(small()))
    rows = index.chunks_of(0)
    assert rows.file.tolist() == [0, 0]
    assert rows.offset.tolist() == [4096, 4120]
    assert rows.starts.tolist() == [[0, 0], [2, 0]]
    assert rows.sizes.tolist() == [[2, 3], [2, 3]]
    assert index.chunks_of(1).starts.shape == (1, 0)
    assert index.chunks_of(2).sizes.tolist() == [[0, 7]]


def test_an_index_is_compared_by_value() -> None:
    assert small() == small()
    assert small() != Index.build(small().files, [], [], [])
    assert small() != "an index"


def test_an_index_of_nothing() -> None:
    empty = Index.build([], [], [], [])
    assert decode(encode(empty)) == empty


@pytest.mark.parametrize(
    "row",
    [
        (1, 0, 0, Box((0,), (1,))),
        (-1, 0, 0, Box((0,), (1,))),
        (0, 0, 0, Box((0, 0), (1, 1))),
        (0, 0, 0, Box((0,), ())),
        (0, -1, 0, Box((0,), (1,))),
        (0, 0, 2**64, Box((0,), (1,))),
        (0, 0, 0, Box((2**63,), (1,))),
    ],
)
def test_a_chunk_that_no_table_can_hold_is_refused(row: Row) -> None:
    with pytest.raises(UsageError):
        Index.build([file_entry()], [TensorEntry("model", "w", "int8", (1,))], [], [row])


def test_nothing_is_encoded_that_cannot_be_decoded() -> None:
    files, tensors = [file_entry()], [TensorEntry("model", "w", "int8", (4,))]
    with pytest.raises(IntegrityError, match="missing"):
        encode(Index.build(files, tensors, [], [(0, 0, 0, Box((0,), (3,)))]))
    surrogate = [TensorEntry("model", "\ud800", "int8", (1,))]
    with pytest.raises(UsageError, match="cannot hold"):
        encode(Index.build(files, surrogate, [], [(0, 0, 0, Box((0,), (1,)))]))


def boxes(*rows: tuple[list[int], list[int]]) -> bytes:
    """The box column of the small index, with other boxes for its matrix."""
    flat = [value for starts, sizes in rows for value in starts + sizes]
    return column("<i8", *flat, 0, 0, 0, 7)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        (boxes(([0, 0], [2, 3]), ([1, 0], [3, 3])), "overlap"),
        (boxes(([0, 0], [2, 3]), ([2, 0], [1, 3])), "missing"),
        (boxes(([0, 0], [2, 3]), ([2, 0], [2, 2])), "missing"),
        (boxes(([0, 0], [2, 3]), ([2, 0], [3, 3])), "out of bounds"),
        (boxes(([-1, 0], [3, 3]), ([2, 0], [2, 3])), "out of bounds"),
        (boxes(([0, 0], [2, 3]), ([2, 0], [2**62, 2**62])), "out of bounds"),
        (boxes(([0, 0], [4, 3]), ([2, 0], [0, 3])), "overlap"),
    ],
)
def test_chunks_that_do_not_tile_their_tensor_name_it(box: bytes, problem: str) -> None:
    with pytest.raises(IntegrityError, match=f"'w' of part 'model'.*{problem}") as caught:
        decode(wire(chunk_box=box))
    assert caught.value.kind is ErrorKind.COVERAGE


HUGE = ["model", "huge", "float32", [2**60]]
DIGEST = "0" * 16


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"files": [["../model.r00000.safetensors", 0, DIGEST, b""]]}, "not the name of a shard"),
        ({"files": [["..", 0, DIGEST, b""]]}, "not the name of a shard"),
        ({"files": [["index.msgpack", 0, DIGEST, b""]]}, "not the name of a shard"),
        ({"files": [["model.r00000.safetensors", -1, DIGEST, b""]]}, "claims -1 bytes"),
        ({"files": [["model.r00000.safetensors", 2**63, DIGEST, b""]]}, "claims"),
        ({"files": [["model.r00000.safetensors", 2**60, DIGEST, b""]]}, "0 bytes of digests"),
        ({"files": [["model.r00000.safetensors", 1, DIGEST, bytes(8)]]}, "differ from its digest"),
        ({"files": [dataclasses.astuple(file_entry())[:4]] * 2}, "same name"),
        ({"tensors": [["model", "w", "float32", [4, 3]]] * 2}, "same name"),
        ({"tensors": [["../model", "w", "float32", [4, 3]]]}, "name that cannot be"),
        ({"tensors": [["extra", "w", "float32", [4, 3]]]}, "name that cannot be"),
        ({"tensors": [["model", "__metadata__", "float32", [4]]]}, "name that cannot be"),
        ({"tensors": [["model", "w", "object", [4, 3]]]}, "unknown dtype 'object'"),
        ({"tensors": [["model", "w", "int8", [-4, 3]]]}, "impossible shape"),
        ({"tensors": [["model", "w", "int8", [2**63]]]}, "impossible shape"),
        ({"tensors": [["model", "w", "int8", [1] * 65]]}, "impossible shape"),
        ({"tensors": [["model", "w", "int8", [2**32, 2**31]]]}, r"2\*\*63 bytes"),
        ({"tensors": [["model", "w", "float64", [2**60]]]}, r"2\*\*63 bytes"),
        ({"tensors": [["model", "w", "int8", [True]]]}, "decoded"),
        ({"tensors": [["model", "w", "int8", [1], "more"]]}, "decoded"),
        ({"tensors": []}, "does not exist"),
        ({"chunk_tensor": column("<u4", 1, 0, 0, 2)}, "not sorted"),
        ({"chunk_tensor": column("<u4", 0, 0, 1, 3)}, "does not exist"),
        ({"chunk_tensor": column("<u4", 0, 0, 1)}, "differ in length"),
        ({"chunk_file": column("<u4", 0, 0, 2, 0)}, "does not exist"),
        ({"chunk_offset": bytes(31)}, "no array"),
        ({"chunk_offset": column("<u8", FILE_BYTES - 23, 0, 0, 0)}, "takes 24 bytes"),
        ({"chunk_offset": column("<u8", 2**64 - 1, 0, 0, 0)}, "takes 24 bytes"),
        ({"chunk_offset": column("<u8", 0, 0, FILE_BYTES - 7, 0)}, "takes 8 bytes"),
        ({"chunk_offset": column("<u8", 0, 0, 0, FILE_BYTES + 1)}, "takes 0 bytes"),
        ({"chunk_box": bytes(8)}, "do not fit the dimensions"),
        ({"surprise": 1}, "decoded"),
        ({"files": "all"}, "decoded"),
        ({"format": "1"}, "decoded"),
    ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(IntegrityError, match=problem):
        decode(wire(**changes))


def test_a_tensor_of_2_to_the_60_elements_is_only_a_number() -> None:
    claim = {
        "tensors": [HUGE],
        "chunk_tensor": column("<u4", 0),
        "chunk_file": column("<u4", 0),
        "chunk_offset": column("<u8", 4096),
        "chunk_box": column("<i8", 0, 2**60),
    }
    with pytest.raises(IntegrityError, match=f"takes {2**62} bytes at 4096"):
        decode(wire(**claim))
    with pytest.raises(IntegrityError, match="missing"):
        decode(wire(**{**claim, "chunk_box": column("<i8", 0, 2**59)}))


def test_a_tensor_without_chunks_is_missing() -> None:
    tensors = [*msgspec.to_builtins(small().tensors), HUGE]
    with pytest.raises(IntegrityError, match=r"'huge' .*no chunk") as caught:
        decode(wire(tensors=tensors))
    assert caught.value.kind is ErrorKind.COVERAGE


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (["..", None, 1, 4096, 2, DIGEST], "name that cannot be"),
        (["rng", -1, 1, 4096, 2, DIGEST], "rank -1"),
        (["rng", 10**5, 1, 4096, 2, DIGEST], "rank 100000"),
        (["rng", None, 2, 4096, 2, DIGEST], "file 2 of 2"),
        (["rng", None, -1, 4096, 2, DIGEST], "file -1 of 2"),
        (["rng", None, 1, -1, 2, DIGEST], "4100"),
        (["rng", None, 1, 4096, -2, DIGEST], "4100"),
        (["rng", None, 1, 4096, 5, DIGEST], "4100"),
        (["rng", None, 1, 2**64 - 1, 2**64 - 1, DIGEST], "4100"),
        (["rng", None, 1, 4096, 2, "0" * 15 + "G"], "no digest"),
    ],
)
def test_objects_are_checked(entry: list[Any], problem: str) -> None:
    with pytest.raises(IntegrityError, match=problem):
        decode(wire(objects=[entry]))


def test_the_values_of_a_part_are_stored_once() -> None:
    with pytest.raises(IntegrityError, match="twice"):
        decode(wire(objects=[["rng", 0, 1, 4096, 2, DIGEST]] * 2))


@pytest.mark.parametrize("version", [0, 2, 2**63])
def test_another_version_is_not_damage(version: int) -> None:
    data = msgspec.msgpack.encode({"format": version, "shape": "unheard of"})
    with pytest.raises(IncompatibleError, match=f"version {version}, .* version 1") as caught:
        decode(data)
    assert caught.value.kind is ErrorKind.VERSION


@pytest.mark.parametrize(
    "data", [b"", b"\x91" * 100_000, b"\x80", b"\xc1", encode(small()) + b"\x00"]
)
def test_bytes_that_are_no_index_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        decode(data)
    assert caught.value.kind is ErrorKind.MALFORMED


def test_an_index_cut_short_anywhere_is_refused() -> None:
    data = encode(small())
    for stop in range(len(data)):
        with pytest.raises(IntegrityError) as caught:
            decode(data[:stop])
        assert caught.value.kind is ErrorKind.MALFORMED


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_changed_byte_is_refused_or_makes_another_valid_index(mask: int) -> None:
    data = encode(small())
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= mask
        try:
            index = decode(bytes(changed))
        except (IntegrityError, IncompatibleError):
            continue
        assert encode(index) == bytes(changed)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((IntegrityError, IncompatibleError)):
        decode(data)


def test_a_large_table_is_checked_whole() -> None:
    """A thousand tensors in row shards, one of them cut into columns too, one chunk moved."""
    ranks, count = 64, 1000
    grid = np.zeros((count, ranks, 2, 2), np.int64)
    grid[:, :, 0, 0] = np.arange(ranks) * 2
    grid[:, :, 1] = (2, 16)
    grid[7, :, 0] = np.stack([np.arange(ranks) // 4 * 8, np.arange(ranks) % 4 * 4], axis=1)
    grid[7, :, 1] = (8, 4)
    tensors = tuple(TensorEntry("model", f"t{i}", "float32", (128, 16)) for i in range(count))
    table = ChunkTable(
        np.repeat(np.arange(count), ranks).astype(np.uint32),
        np.zeros(count * ranks, np.uint32),
        np.full(count * ranks, 4096, np.uint64),
        grid.reshape(-1),
    )
    index = Index((file_entry(),), tensors, (), table)
    assert decode(encode(index)) == index
    grid[900, 33, 0, 0] += 1
    with pytest.raises(IntegrityError, match=r"'t900' .*overlap and missing"):
        encode(index)
