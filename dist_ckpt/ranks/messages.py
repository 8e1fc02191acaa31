"""What ranks say to one another: plain data, and the check that all were asked for one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from dist_ckpt.errors import UsageError

MessageT = TypeVar("MessageT", bound=msgspec.Struct)


class Request(Protocol):
    """The first word of a call that every rank has to make alike."""

    @property
    def step(self) -> int | None:
        """Which checkpoint."""

    @property
    def url(self) -> str:
        """Where."""

    @property
    def options(self) -> Mapping[str, str]:
        """How, each option as text."""


def check_same(requests: Sequence[Request], verb: str) -> None:
    """Check that all ranks were asked for one thing, and in one way.

    Args:
        requests: the first word of each rank.
        verb: what they were asked to do, for the message.

    Raises:
        UsageError: with what each rank was asked for, or two ranks and the option in which they
            differ.
    """
    for what in ("step", "url"):
        asked = {rank: getattr(request, what) for rank, request in enumerate(requests)}
        if len(set(asked.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in asked.items())
            raise UsageError(
                f"the ranks were asked to {verb} different things ({what}: {listed}): make the "
                "call with the same arguments on every rank",
                ranks={rank: str(value) for rank, value in asked.items()},
            )
    first = requests[0].options
    for rank, request in enumerate(requests):
        # The usual case costs one comparison; only a difference is looked for by name.
        if request.options == first:
            continue
        for name in sorted({*first, *request.options}):
            here, there = (options.get(name, "absent") for options in (first, request.options))
            if here != there:
                raise UsageError(
                    f"the ranks were asked to {verb} in different ways ({name} is {here} on rank 0 "
                    f"and {there} on rank {rank}): make the call with the same options on every "
                    "rank",
                    ranks={0: f"{name}: {here}", rank: f"{name}: {there}"},
                )


def pack(message: msgspec.Struct) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type[MessageT]) -> MessageT:
    """Decode a message of a known kind."""
    return msgspec.msgpack.decode(data, type=kind)
