"""What strangers do to a port: scans, garbage, halves of frames, silence. Run as a program.

    python tests/crash/flood.py PORT CONNECTIONS SEED

Needs nothing but Python, so that it starts at once, and tells on stdout when it begins.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import sys
from collections import deque

MAGIC = b"dist_ckpt rounds 2\n"
# So many are kept open, to be in the way.
KEPT = 100


def words(rng: random.Random) -> bytes:
    """Return something that no rank says."""
    size = rng.choice((0, 1, 50, 255, 256, 257, 4096, 1 << 20))
    return rng.choice(
        (
            b"",
            os.urandom(size),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            struct.pack(">I", size) + os.urandom(size),
            struct.pack(">I", 0xFFFFFFFF) + os.urandom(size),
            struct.pack(">I", 200) + os.urandom(100),
            struct.pack(">I", len(MAGIC) + 32) + MAGIC + os.urandom(32),
            b"\x00",
        )
    )


def visit(port: int, rng: random.Random, kept: deque[socket.socket]) -> None:
    """Connect once, say something or nothing, and go in one way or another, or stay."""
    stranger = socket.create_connection(("127.0.0.1", port), timeout=600)
    with contextlib.suppress(OSError):  # it may have been turned away already
        stranger.sendall(words(rng))
        if rng.random() < 0.2:
            stranger.shutdown(socket.SHUT_WR)
    how = rng.random()
    if how < 0.3:
        kept.append(stranger)
        if len(kept) > KEPT:
            kept.popleft().close()
        return
    if how < 0.6:  # a reset, as of a scan
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stranger.close()


def main() -> None:
    """Visit the port as often as asked."""
    port, connections, seed = map(int, sys.argv[1:])
    rng = random.Random(seed)
    kept: deque[socket.socket] = deque()
    for number in range(connections):
        visit(port, rng, kept)
        if not number:
            sys.stdout.write("begun\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
