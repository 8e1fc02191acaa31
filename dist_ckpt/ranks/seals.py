"""Seals of frames: each shows that a frame comes from the peer that was greeted, next in its order.

Two ends that have greeted each other have a key for each direction, which nobody else has and no
other connection. With every frame goes a digest, under that key, of how many went before and of
what it says: a frame that was made up, changed, repeated, left out or put before another does not
fit. What frames say is not hidden, as what the training itself sends is not.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

SEAL_BYTES = 16
"""How long a seal is."""

_COUNT_BYTES = 8


class Packed(NamedTuple):
    """The body of a frame and its digest: found once, however many peers it is sent to."""

    body: bytes
    digest: bytes


def with_digest(body: bytes) -> Packed:
    """Return `body` as it can be sealed for any peer."""
    return Packed(body, hashlib.sha256(body).digest())


class Seals:
    """What one end of a connection needs to seal its frames and to check those of its peer."""

    def __init__(self, own: bytes, peers: bytes) -> None:
        """Begin to count.

        Args:
            own: key of what this end says.
            peers: key of what it hears.
        """
        self._own = own
        self._peers = peers
        self._said = 0
        self._heard = 0

    def next(self, digest: bytes) -> bytes:
        """Return the seal of the frame that is the next to be sent."""
        seal = _seal(self._own, self._said, digest)
        # With each frame and never back: the peer counts alike, so none can be left out.
        self._said += 1
        return seal

    def check(self, seal: bytes, body: bytes) -> None:
        """Check the frame that came next.

        Raises:
            ValueError: the peer did not send it, or not now.
        """
        expected = _seal(self._peers, self._heard, with_digest(body).digest)
        # In constant time: how far a guess fits must not show.
        if not hmac.compare_digest(seal, expected):
            raise ValueError("a frame without its seal")
        self._heard += 1


def _seal(key: bytes, count: int, digest: bytes) -> bytes:
    # Of a fixed width, so that no count can pass for a part of the digest.
    words = count.to_bytes(_COUNT_BYTES, "big") + digest
    return hashlib.blake2b(words, key=key, digest_size=SEAL_BYTES).digest()
