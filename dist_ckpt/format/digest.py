"""Digests: xxh3-64, one per 1 MiB block of a file, and one of those for the file.

They find damage, not forgery: whoever can write to the store can write matching digests too.
"""

from __future__ import annotations

import xxhash

from dist_ckpt.errors import UsageError

Buffer = bytes | bytearray | memoryview

BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8


def block_count(nbytes: int) -> int:
    """Return how many blocks a file of `nbytes` bytes has; the last one may be short."""
    return -(-nbytes // BLOCK_BYTES)


def block_digests(*buffers: Buffer) -> bytes:
    """Return the digest of each block of `buffers`, 8 bytes big-endian each, b"" for no bytes.

    The digests of a file may be computed in pieces and joined, as long as every piece but the
    last is a whole number of blocks.

    Args:
        buffers: the bytes, one buffer after another, C-contiguous, of any element type.
    """
    digests = []
    block, room = None, BLOCK_BYTES
    for buffer in buffers:
        view, start = memoryview(buffer).cast("B"), 0
        while start < len(view):
            piece = view[start : start + room]
            start += len(piece)
            if len(piece) == BLOCK_BYTES:
                digests.append(xxhash.xxh3_64_digest(piece))
                continue
            block = block or xxhash.xxh3_64()
            block.update(piece)
            room -= len(piece)
            if not room:
                digests.append(block.digest())
                block, room = None, BLOCK_BYTES
    if block is not None:
        digests.append(block.digest())
    return b"".join(digests)


def file_digest(digests: bytes) -> str:
    """Return the digest of a file, 16 hex digits, from its joined block digests.

    Raises:
        UsageError: `digests` is not a whole number of block digests.
    """
    if len(digests) % DIGEST_BYTES:
        raise UsageError(
            f"{len(digests)} bytes of block digests: pass what block_digests returned, joined"
        )
    return bytes_digest(digests)


def bytes_digest(data: Buffer) -> str:
    """Return the digest of `data` as one piece, 16 hex digits: for the index and for objects."""
    return xxhash.xxh3_64_hexdigest(data)
