"""Whether all ranks of a job mean one place: asked once, before anything can be committed there.

Hosts without a shared disk have a folder each under the same path. Each rank would write its
files, rank 0 would commit, and no load would ever find the files of the others.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import NotFound, UsageError
from dist_ckpt.format.names import claim_key
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Topic
from dist_ckpt.ranks.waiting import ranks_as_text
from dist_ckpt.storage.base import Store, read_all

# A shared file system may show to one host a moment later what another one has written.
_PATIENCE_SECONDS = 10.0
_FIRST_NAP_SECONDS, _LONGEST_NAP_SECONDS = 0.01, 1.0
# A claim is far smaller, so whatever has more bytes is none.
_LIMIT_BYTES = 1 << 16


@decodable
class _Token(msgspec.Struct, frozen=True):
    """What rank 0 has put there: the file of its claim, which no other place has."""

    key: str
    content: bytes
    host: str


@decodable
class _Sight(msgspec.Struct, frozen=True):
    """Whether a rank finds the token, and where the rank is."""

    found: bool
    host: str


def check_same_place(
    coordinator: Coordinator, store: Store, claim: int | None, *, topic: Topic, deadline: Deadline
) -> None:
    """Check that every rank finds in its `store` what rank 0 has put into its own; two rounds.

    Args:
        coordinator: the way to the other ranks.
        store: where this rank writes to.
        claim: on rank 0, the number of the claim that it has taken there.
        topic: names the rounds.
        deadline: when to give up.

    Raises:
        UsageError: some ranks do not, named with their hosts; the same on every rank.
        CheckpointError: it could not be found out.
    """

    def token(_: Sequence[bytes]) -> bytes:
        assert claim is not None
        return token_of(store, claim)

    data = coordinator.round(topic.phase("token"), b"", token, deadline=deadline)

    def judge(messages: Sequence[bytes]) -> bytes:
        check_sights(store.url, data, messages)
        return b""

    message: bytes | Exception
    try:
        message = sight_of(store, data, deadline, leads=coordinator.rank == 0)[1]
    except Exception as error:  # the others wait in the round
        message = error
    coordinator.round(topic.phase("sight"), message, judge, deadline=deadline)


def token_of(store: Store, claim: int) -> bytes:
    """Rank 0: return what only the place has that it has taken `claim` in."""
    key = claim_key(claim)
    # Read back and not remembered: what this place holds is what the others have to find.
    content = read_all(store, key, limit_bytes=_LIMIT_BYTES)
    return msgspec.msgpack.encode(_Token(key, content, socket.gethostname()))


def sight_of(store: Store, token: bytes, deadline: Deadline, *, leads: bool) -> tuple[bool, bytes]:
    """Return whether this rank finds the token in its `store`, and that as it is told to rank 0.

    Args:
        store: where this rank writes to.
        token: from `token_of`.
        deadline: when the others give up.
        leads: whether this is the rank that made it.
    """
    wanted = msgspec.msgpack.decode(token, type=_Token)
    # Who made the token has read it there already.
    found = leads or _finds(store, wanted, deadline)
    return found, msgspec.msgpack.encode(_Sight(found, socket.gethostname()))


def check_sights(url: str, token: bytes, messages: Sequence[bytes]) -> None:
    """Rank 0: check that every rank found the token.

    Args:
        url: the place, for the message.
        token: from `token_of`.
        messages: of each rank, from `sight_of`.

    Raises:
        UsageError: some did not, named with their hosts.
    """
    wanted = msgspec.msgpack.decode(token, type=_Token)
    sights = [msgspec.msgpack.decode(data, type=_Sight) for data in messages]
    _check_all_found(url, wanted, sights)


def _finds(store: Store, wanted: _Token, deadline: Deadline) -> bool:
    # Not for most of the time there is: the answer has to reach all ranks.
    until = time.monotonic() + min(_PATIENCE_SECONDS, deadline.remaining_seconds / 4)
    nap = _FIRST_NAP_SECONDS
    while True:
        try:
            # By content: another place may have a claim of this number, of another job.
            if read_all(store, wanted.key, limit_bytes=_LIMIT_BYTES) == wanted.content:
                return True
        except NotFound:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP_SECONDS)


def _check_all_found(url: str, wanted: _Token, sights: Sequence[_Sight]) -> None:
    blind: dict[str, list[int]] = {}
    for rank, sight in enumerate(sights):
        if not sight.found:
            blind.setdefault(sight.host, []).append(rank)
    if not blind:
        return
    raise UsageError(
        f"the ranks do not share one place at {url}: {_listed(blind)} cannot find there what rank "
        f"0 on {wanted.host} has just written ({wanted.key}), so a checkpoint would be in pieces "
        "in several places: give a path on a file system that all hosts share, or a URL such as "
        "s3://bucket/run; or, where each host has a disk of its own, node_local=True",
        ranks={
            rank: f"{host} does not have {wanted.key}"
            for host, ranks in blind.items()
            for rank in ranks
        },
    )


def _listed(blind: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"rank {ranks_as_text(ranks)} on {host}" for host, ranks in blind.items())
