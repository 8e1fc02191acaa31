"""How the two ends of a connection prove that they are of one job, before either says more.

Rank 0 publishes a secret in the training's own store. It asks whoever connects; who greets proves
that it has read the secret, and hears the same proof. The keys of all that follows come of the
secret and of what both said here, so that no other connection has them.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Literal

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.ranks.seals import Seals

GREETING_LIMIT_BYTES = 256
"""How long a frame may be before either side knows whom it speaks to."""

NONCE_BYTES = 32
"""How long a secret is, and whatever must be new."""

End = Literal["rank", "hub"]

# With a number: releases that greet otherwise take each other for another server.
_MAGIC = b"dist_ckpt rounds 2\n"


@decodable
class Hello(msgspec.Struct, array_like=True, frozen=True):
    """What a rank says first: who it is, something new, and the proof that it is one of the job."""

    rank: int
    world_size: int
    nonce: bytes
    proof: bytes


def challenge() -> bytes:
    """Return what rank 0 says first on a connection, never the same twice."""
    return _MAGIC + secrets.token_bytes(NONCE_BYTES)


def hello(rank: int, world_size: int, secret: bytes, heard: bytes) -> Hello:
    """Return the answer of `rank` to a challenge.

    Raises:
        ValueError: what was heard is no challenge: it is some other server.
    """
    if not heard.startswith(_MAGIC) or len(heard) != len(_MAGIC) + NONCE_BYTES:
        raise ValueError("another server")
    # New on this end too, so that a challenge sent twice gives neither proof nor keys twice.
    said = Hello(rank, world_size, secrets.token_bytes(NONCE_BYTES), b"")
    return msgspec.structs.replace(said, proof=proof("rank", secret, heard, said))


def proof(who: End, secret: bytes, heard: bytes, said: Hello) -> bytes:
    """Return what only a member of the job can say after this challenge and what a rank said.

    Args:
        who: "rank" or "hub", so that neither's word can be taken for the other's.
        secret: of the job.
        heard: the challenge.
        said: the answer, whose own proof does not count.
    """
    return _derived(f"proof of the {who}", secret, heard, said)


def seals(who: End, secret: bytes, heard: bytes, said: Hello) -> Seals:
    """Return the seals of one end of a connection on which both have proved who they are."""
    ranks, hubs = (_derived(f"key of the {end}", secret, heard, said) for end in ("rank", "hub"))
    return Seals(ranks, hubs) if who == "rank" else Seals(hubs, ranks)


def _derived(what: str, secret: bytes, heard: bytes, said: Hello) -> bytes:
    # Packed and not joined, so that no other words make the same bytes.
    words = msgspec.msgpack.encode((what, heard, said.rank, said.world_size, said.nonce))
    return hmac.digest(secret, words, "sha256")
