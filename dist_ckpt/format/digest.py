"""Digests: xxh3-64, one for each block of a file, and one of those for the file.

They find damage, not forgery: whoever can write to the store can write matching digests too.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from dist_ckpt.errors import UsageError

Buffer = bytes | bytearray | memoryview

BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8

SMALL_BYTES = 4096
"""Chunks of fewer bytes share a block, and no block inside a larger one has fewer."""

# A reader of a part of a chunk reads up to two blocks in vain, of at least so many.
_BLOCKS_OF_A_CHUNK = 32


def block_count(nbytes: int) -> int:
    """Return how many blocks a file of `nbytes` bytes has; the last one may be short."""
    return -(-nbytes // BLOCK_BYTES)


def cut_blocks(head_bytes: int, chunks: Iterable[int]) -> list[int]:
    """Return the lengths of the blocks of a file, so that a part of a chunk is read by itself.

    Args:
        head_bytes: what comes before the first chunk.
        chunks: bytes of each chunk, in the order in which they follow one another.
    """
    lengths = _pieces(head_bytes, BLOCK_BYTES)
    together = 0
    for nbytes in chunks:
        if nbytes < SMALL_BYTES:
            together += nbytes
        if together and (nbytes >= SMALL_BYTES or together >= SMALL_BYTES):
            lengths.append(together)
            together = 0
        if nbytes >= SMALL_BYTES:
            power = (nbytes // _BLOCKS_OF_A_CHUNK).bit_length() - 1
            lengths += _pieces(nbytes, min(max(1 << power, SMALL_BYTES), BLOCK_BYTES))
    return [*lengths, together] if together else lengths


def _pieces(nbytes: int, most: int) -> list[int]:
    whole, rest = divmod(nbytes, most)
    return [most] * whole + [rest] * bool(rest)


def block_digests(*buffers: Buffer) -> bytes:
    """Return the digest of each 1 MiB of `buffers`, 8 bytes big-endian each, b"" for no bytes.

    The digests of a file may be computed in pieces and joined, as long as every piece but the
    last is a whole number of blocks.

    Args:
        buffers: the bytes, one buffer after another, C-contiguous, of any element type.
    """
    nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
    return digest_blocks(_pieces(nbytes, BLOCK_BYTES), *buffers)


def digest_blocks(lengths: Iterable[int], *buffers: Buffer) -> bytes:
    """Return the digests of blocks of `lengths`, 8 bytes big-endian each.

    Args:
        lengths: none is 0, and all together they are the bytes of `buffers`.
        buffers: the bytes, one buffer after another, C-contiguous, of any element type.
    """
    digests: list[bytes] = []
    following = iter(lengths)
    block, room = None, 0
    for buffer in buffers:
        view, start = memoryview(buffer).cast("B"), 0
        while start < len(view):
            fresh = not room
            room = room or next(following)
            piece = view[start : start + room]
            start += len(piece)
            room -= len(piece)
            if fresh and not room:
                digests.append(xxhash.xxh3_64_digest(piece))
                continue
            block = block or xxhash.xxh3_64()
            block.update(piece)
            if not room:
                digests.append(block.digest())
                block = None
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
