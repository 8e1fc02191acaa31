"""Root and segments: what goes in comes out, and nothing that was made up is taken."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format import names
from dist_ckpt.format.files import (
    BLOCK_BYTES,
    DTYPES,
    FileEntry,
    bytes_digest,
    cut_blocks,
    digest_blocks,
)
from dist_ckpt.format.index import Box, Index, ObjectEntry, TensorEntry, split_rows
from dist_ckpt.format.names import column
from dist_ckpt.format.segments import (
    Root,
    Segment,
    Spent,
    decode_root,
    decode_segment,
    join_segments,
)
from dist_ckpt.format.whole import encode_whole
from tests.compat.hostile import mutated

FILE_BYTES = 20000


def file_entry(name: str, *lengths: int) -> FileEntry:
    blocks = b"".join(number.to_bytes(8, "big") for number in range(len(lengths)))
    return FileEntry.of(name, sum(lengths), blocks, lengths)


FILES = (
    file_entry("extra.r00000.safetensors", 4096, 100),
    file_entry("model.r00000.safetensors", 4096, 5000, FILE_BYTES - 9096),
    file_entry("model.r00002.safetensors", *[1000] * 20),
    file_entry("model.r00002-00001.safetensors", FILE_BYTES),
)


def small() -> Index:
    """A checkpoint of two ranks: a matrix in halves and one tied to it, a scalar, values."""
    tensors = [
        TensorEntry("model", "w", "float32", (4, 3)),
        TensorEntry("model", "v", "float32", (4, 3)),
        TensorEntry("model", "t", "int64", ()),
        TensorEntry("optimizer", "w", "bfloat16", (0, 7)),
    ]
    objects = [
        ObjectEntry("rng", 0, 0, 4096, 2, bytes_digest(b"{}")),
        ObjectEntry("notes", None, 0, 4098, 2, bytes_digest(b"{}")),
    ]
    rows = [
        *((n, 1, 4096, Box((0, 0), (2, 3))) for n in (0, 1)),
        *((n, 2, 4120, Box((2, 0), (2, 3))) for n in (0, 1)),
        (2, 3, 4144, Box((), ())),
        (3, 1, FILE_BYTES, Box((0, 0), (0, 7))),
    ]
    return Index.build(FILES, tensors, objects, rows)


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    tensors: list[TensorEntry] = []
    rows: list[tuple[int, int, int, Box]] = []
    shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    for i in range(draw(st.integers(0, 6))):
        tied = bool(tensors) and draw(st.booleans())
        like = draw(st.integers(0, i - 1)) if tied else 0
        shape = tensors[like].shape if tied else draw(shapes)
        dtype = tensors[like].dtype if tied else draw(st.sampled_from(sorted(DTYPES)))
        tensors.append(TensorEntry("model", f"t{i}", dtype, shape))
        if tied:
            rows += [(i, *row[1:]) for row in rows if row[0] == like]
            continue
        for piece in split_rows(Box((0,) * len(shape), shape), draw(st.integers(1, 4))):
            file, offset = draw(st.integers(0, 3)), draw(st.integers(0, 40))
            rows += [(i, file, offset, box) for box in split_rows(piece, draw(st.integers(1, 2)))]
    return Index.build(FILES, tensors, [], draw(st.permutations(rows)))


def read(data: bytes) -> tuple[Root, dict[int, Segment]]:
    root = decode_root(data)
    places = range(len(root.segments))
    return root, {n: decode_segment(root.segments[n].inside, root, n) for n in places}


@settings(max_examples=60)
@given(indexes())
def test_an_index_comes_back_from_its_segments(index: Index) -> None:
    assert join_segments(*read(encode_whole(index))) == index


def test_the_small_index_comes_back() -> None:
    root, segments = read(encode_whole(small(), [Spent(0.25, 1.5)]))
    assert join_segments(root, segments) == small()
    assert root.spent == (Spent(0.25, 1.5),)
    assert root.structure.owner.tolist() == [0, 0, 2, 3]
    assert len(root.structure.layouts) == 3, "one for both matrices"
    assert root.places_of_part("rng", rank=0) == root.places_of_part("notes", rank=1) == [0]
    assert root.places_of_part("rng", rank=1) == []


def test_one_segment_tells_of_its_own_chunks_alone() -> None:
    root, segments = read(encode_whole(small()))
    part = join_segments(root, {1: segments[1]})
    assert part.tensors == small().tensors
    assert [file.name for file in part.files] == [file.name for file in FILES]
    assert [file.digest != "" for file in part.files] == [False, False, True, True]
    assert part.chunks_of(1).starts.tolist() == [[2, 0]]
    assert len(part.chunks_of(3).file) == 0
    assert root.structure.holders([(0, Box((2, 0), (1, 1)))]).tolist() == [2]
    assert root.structure.holders([(1, Box((1, 0), (2, 3)))]).tolist() == [0, 2]


@given(st.integers(0, 1 << 22), st.lists(st.integers(0, 1 << 26), max_size=9))
def test_blocks_are_of_one_chunk_or_of_small_ones(head: int, sizes: list[int]) -> None:
    lengths = cut_blocks(head, sizes)
    assert sum(lengths) == head + sum(sizes)
    assert all(0 < length <= BLOCK_BYTES for length in lengths)
    edges = {0, *np.cumsum(lengths).tolist()}
    start = head
    for size in sizes:
        if size >= 4096:
            assert {start, start + size} <= edges
            most = max(size // 32, 4096)
            inside = [edge for edge in edges if start <= edge <= start + size]
            assert max(np.diff(sorted(inside)).tolist()) <= most
        start += size


def test_digests_do_not_depend_on_buffers() -> None:
    data = bytes(range(256)) * 40
    lengths = [1, 4095, 4096, 2048]
    whole = digest_blocks(lengths, data)
    assert digest_blocks(lengths, data[:3000], b"", data[3000:5000], data[5000:]) == whole
    assert whole[8:16] == digest_blocks([4095], data[1:4096])


# What was made up.


def remade(part: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return the small root with a table of it changed, and the digests that go with it."""
    wire = msgspec.msgpack.decode(encode_whole(small()))
    if part == "root":
        change(wire)
    elif part != "segment":
        wire[part] = repacked(wire[part], change)
    else:
        wire = resealed(wire, lambda data: segment_changed(data, change))
    return msgspec.msgpack.encode(wire)


def repacked(table: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    fields = msgspec.msgpack.decode(zlib.decompress(table))
    change(fields)
    return zlib.compress(msgspec.msgpack.encode(fields))


def segment_changed(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    segment = msgspec.msgpack.decode(data)
    segment["table"] = repacked(segment["table"], change)
    change(segment)
    return msgspec.msgpack.encode(segment)


def resealed(wire: dict[str, Any], change: Callable[[bytes], bytes]) -> dict[str, Any]:
    """Change the first segment, as if it had been committed like that."""
    table = msgspec.msgpack.decode(zlib.decompress(wire["attempt"]))
    sizes = np.cumsum(np.frombuffer(table["nbytes"], "<i8"))
    first = change(wire["segments"][: int(sizes[0])])
    rest = wire["segments"][int(sizes[0]) :]
    table["nbytes"] = column([len(first), *sizes[1:]])
    table["digests"] = bytes.fromhex(bytes_digest(first)) + table["digests"][8:]
    attempt = zlib.compress(msgspec.msgpack.encode(table))
    return {**wire, "attempt": attempt, "segments": first + rest}


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        if name in fields:
            fields[name] = value

    return change


def add(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update({name: b""})


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("root", put("structure", b"not zlib"), "inflated"),
        ("root", put("segments", b""), "as long as"),
        ("root", add("more"), "decoded"),
        ("structure", put("names", ["w"] * 4), "same name"),
        ("structure", put("dtypes", ["float", "a", "b"]), "unknown dtype"),
        ("structure", put("part", column([0, 0, 0, 9])), "cannot be"),
        ("structure", put("ndim", column([2, 2, 0])), "fit"),
        ("structure", put("shape", column([4, 3, 4, 3, 0])), "fit"),
        ("structure", put("shape", b"xyz"), "no column"),
        ("structure", put("layout", column([0, 0, 1, 1])), "another shape"),
        ("structure", put("layout", column([0, 0, 1, 3])), "cannot be"),
        ("structure", put("back", column([0, 1, 2, 0])), "cannot have the bytes"),
        ("structure", put("back", column([1, 1, 0, 0])), "cannot have the bytes"),
        ("structure", put("rows", column([2, 1, 2**31])), "fit"),
        ("structure", put("rows", column([2, 1, 2**60])), "cannot be"),
        ("structure", put("rows", column([1, 1, 2])), "each element once"),
        ("structure", put("rank", column([0, 1, 2, 0])), "no segment"),
        ("structure", put("rank", column([0, -1, 2, 0])), "cannot be"),
        ("structure", put("start", column([0, 1, 0, 0, 0, 0])), "each element once"),
        ("structure", put("size", column([2, 2**62, 3, 3, 0, 7])), "each element once"),
        ("structure", add("more"), "decoded"),
        ("attempt", put("rank", column([2, 2])), "sorted"),
        ("attempt", put("rank", column([0, 100_000])), "cannot be"),
        ("attempt", put("rank", column([0, 3])), "no segment"),
        ("attempt", put("digests", b""), "fit"),
        ("attempt", put("inside", column([0, 1])), "as long as"),
        ("attempt", put("files", column([2, 2**60])), "fit"),
        ("attempt", put("names", ["..", "model"]), "cannot be"),
        ("attempt", put("names", ["model", "model"]), "a text twice"),
        ("attempt", put("file_number", column([0, 0, 0, 0])), "same name"),
        ("attempt", put("file_nbytes", column([2**62] * 4)), "more bytes"),
        ("attempt", put("file_nbytes", column([4196, 1, 20000, 20000])), "as long as"),
        ("attempt", put("object_own", column([1, 2])), "cannot be"),
        ("attempt", put("object_own", column([1, 1])), "other values"),
        ("attempt", put("object_parts", ["a", "extra"]), "part that cannot be"),
        ("attempt", put("stage_us", column([1])), "fit"),
        ("segment", put("rank", 1), "of rank 1"),
        ("segment", put("digests", bytes(8)), "fit"),
        ("segment", put("table", b""), "cut short"),
        ("segment", put("blocks", column([2, 2**60])), "fit"),
        ("segment", put("length", column([4096, 100, 4096, 0, 15904])), "without a byte"),
        ("segment", put("length", column([4096, 101, 4096, 5000, 10903])), "as long as"),
        ("segment", put("length", column([2**40] * 5)), "cannot be"),
        ("segment", put("tensor", column([0, 2])), "other chunks"),
        ("segment", put("tensor", column([0] * 9)), "fit"),
        ("segment", put("box", column([0] * 8)), "other chunks"),
        ("segment", put("file", column([1, 2])), "cannot be"),
        ("segment", put("file", column([1])), "fit"),
        ("segment", put("offset", column([2**62, 0])), "takes 24 bytes"),
        ("segment", put("objects", []), "other values"),
        ("segment", put("objects", [["rng", True, 0, 4196, 1, "0" * 16]] * 2), "other values"),
        ("segment", add("more"), "decoded"),
    ],
)
def test_a_broken_rule_is_named(
    part: str, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    with pytest.raises(IntegrityError, match=problem):
        read(remade(part, change))


def test_a_table_is_not_inflated_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LIMIT_BYTES", 1 << 20)
    with pytest.raises(IntegrityError, match="too large"):
        read(remade("root", put("structure", zlib.compress(bytes((1 << 20) + 1)))))


@pytest.mark.parametrize("part", ["root", "structure", "attempt", "segment"])
@pytest.mark.parametrize("name", ["earlier", "packed"])
def test_what_is_kept_for_later_is_a_newer_version(part: str, name: str) -> None:
    with pytest.raises(IncompatibleError, match="newer") as caught:
        read(remade(part, add(name)))
    assert caught.value.kind is ErrorKind.VERSION


@pytest.mark.parametrize("part", ["root", "segment"])
def test_another_version_is_no_damage(part: str) -> None:
    with pytest.raises(IncompatibleError, match="version 3"):
        read(remade(part, put("format", 3)))


def test_a_root_that_claims_more_chunks_than_there_are_is_refused() -> None:
    """A million tensors of one layout of a million boxes: nothing is made of the product."""
    names = [f"t{n}" for n in range(1 << 12)]
    boxes = 1 << 20
    table = {
        "parts": ["model"],
        "dtypes": ["int8"],
        "names": names,
        **{name: column([0] * len(names)) for name in ("part", "dtype", "layout", "back")},
        "ndim": column([1] * len(names)),
        "shape": column([boxes] * len(names)),
        "rows": column([boxes]),
        "rank": column([0] * boxes),
        "start": column(np.arange(boxes)),
        "size": column([1] * boxes),
    }
    with pytest.raises(IntegrityError, match="claims more than"):
        read(remade("root", put("structure", zlib.compress(msgspec.msgpack.encode(table)))))


@pytest.mark.parametrize("seed", range(2))
def test_no_mutation_does_more_than_be_refused(seed: int) -> None:
    rng = random.Random(seed)
    whole = encode_whole(small())
    for _ in range(150):
        wire = msgspec.msgpack.decode(whole)
        which = rng.choice(("root", "structure", "attempt", "segment", "table"))
        if which in ("structure", "attempt"):
            wire[which] = zlib.compress(mutated(zlib.decompress(wire[which]), rng))
        elif which == "segment":
            wire = resealed(wire, lambda data: mutated(data, rng))
        elif which == "table":
            wire = resealed(wire, lambda data: _table_mutated(data, rng))
        data = msgspec.msgpack.encode(wire)
        data = mutated(data, rng) if which == "root" else data
        try:
            read(data)
        except (IntegrityError, IncompatibleError):
            continue


def _table_mutated(data: bytes, rng: random.Random) -> bytes:
    segment = msgspec.msgpack.decode(data)
    segment["table"] = zlib.compress(mutated(zlib.decompress(segment["table"]), rng))
    return msgspec.msgpack.encode(segment)


def test_what_no_reader_would_take_is_not_written() -> None:
    index = small()
    with pytest.raises(IntegrityError, match="each element once"):
        encode_whole(
            Index.build(index.files, index.tensors[:1], [], [(0, 1, 0, Box((0, 0), (2, 3)))])
        )
    twice = [*index.tensors[:1], *index.tensors[:1]]
    rows = [(n, 1, 0, Box((0, 0), (4, 3))) for n in (0, 1)]
    with pytest.raises(IntegrityError, match="same name"):
        encode_whole(Index.build(index.files, twice, [], rows))
    stray = ObjectEntry("rng", 2, 0, 4096, 2, bytes_digest(b"{}"))
    with pytest.raises(IntegrityError, match="another rank"):
        encode_whole(Index.build(index.files, [], [stray], []))
    surrogate = [TensorEntry("model", "\ud800", "int8", (1,))]
    with pytest.raises(UsageError, match="cannot hold"):
        encode_whole(Index.build(index.files, surrogate, [], [(0, 1, 0, Box((0,), (1,)))]))
