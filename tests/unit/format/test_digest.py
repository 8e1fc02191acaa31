from __future__ import annotations

import array
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.format import digest
from dist_ckpt.format.digest import (
    BLOCK_BYTES,
    block_count,
    block_digests,
    bytes_digest,
    file_digest,
)


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
        patch.setattr(digest, "BLOCK_BYTES", 8)
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
