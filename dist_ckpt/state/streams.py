"""Streams of random numbers for ranks that have none of their own to continue."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from dist_ckpt.state.part import Stored


def fresh_seed(stored: Stored, kind: str, sources: Iterable[str]) -> bytes:
    """Return 32 bytes to seed a generator with: repeatable, and different on every rank.

    Args:
        stored: what the checkpoint holds; the world size and the rank in it are those of now.
        kind: what is seeded, so that two generators of one rank differ.
        sources: the stored objects that the seed comes from.
    """
    # Not Python's hash, which is salted per process, nor a sum, by which near ranks would collide.
    digest = blake2b(digest_size=32)
    for name in sources:
        digest.update(stored.objects.get(name, b""))
    digest.update(f"/{kind}/{stored.world_size}/{stored.rank}".encode())
    return digest.digest()


def fresh_note(name: str, stored: Stored) -> str | None:
    """Return what a report says of generators that could not be continued, None if they were."""
    if stored.world_size == stored.saved_world_size:
        return None
    return (
        f"{name}: saved by {stored.saved_world_size} ranks and loaded by {stored.world_size}, so "
        "every rank draws from a new stream, made from the checkpoint, the world size and its rank"
    )
