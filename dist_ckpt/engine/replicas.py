"""Are replicas equal? Ranks compare digests of what they hold alike.

The first difference is named: rows of replicas that drifted apart would be a checkpoint of a state
that no rank ever had.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash

from dist_ckpt.dcp.planner import Held, LocalBox
from dist_ckpt.engine.messages import ReplicaDigests, unpack
from dist_ckpt.errors import ErrorKind, IncompatibleError

_log = logging.getLogger("dist_ckpt")

_DIGEST_BYTES = 8
# How the digest of a box was made. Digests are comparable where both letters are equal.
_ON_HOST, _ON_DEVICE = b"h", b"d"
_WORDS_AT_ONCE = 1 << 22
"""How many elements a device widens to 64 bits at a time: temporary memory of some 100 MiB."""


def digest_replicas(boxes: Sequence[LocalBox]) -> ReplicaDigests:
    """Digest the memory of each of `boxes`, without copying a device's memory to the host."""
    methods: list[bytes] = []
    sums: list[torch.Tensor] = []
    host: dict[int, bytes] = {}
    for number, box in enumerate(boxes):
        if box.memory.device.type == "cpu":
            host[number] = _host_digest(box.memory)
            methods.append(_ON_HOST)
        else:
            sums.append(checksum(box.memory))
            methods.append(_ON_DEVICE)
    # Fetched together: one wait for the device, not one for each box.
    fetched = iter(_fetch(sums))
    parts = [host[number] if number in host else next(fetched) for number in range(len(boxes))]
    return ReplicaDigests(b"".join(methods), b"".join(parts))


def compare_replicas(
    held_by_rank: Sequence[Sequence[Held]],
    replicas_by_rank: Sequence[Sequence[int]],
    messages: Sequence[bytes],
) -> bytes:
    """Rank 0: compare the digests of every box over the ranks that hold it; the answer is empty.

    Raises:
        IncompatibleError: a box differs; the message names the tensor and two ranks.
    """
    first: dict[tuple[object, ...], tuple[int, bytes, bytes]] = {}
    incomparable: dict[str, tuple[int, int]] = {}
    for rank, data in enumerate(messages):
        found = unpack(data, ReplicaDigests)
        for number, position in enumerate(replicas_by_rank[rank]):
            held = held_by_rank[rank][position]
            method = found.methods[number : number + 1]
            value = found.digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]
            where = (held.part, held.name, held.offsets, held.sizes)
            other, its_method, its_value = first.setdefault(where, (rank, method, value))
            if method != its_method:
                incomparable.setdefault(f"{held.part}/{held.name}", (other, rank))
            elif value != its_value:
                raise _differ(held, other, rank)
    _warn(incomparable)
    return b""


def checksum(memory: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit checksum of `memory` as an int64 tensor on its device.

    Each 32-bit word (or byte, where they do not fit) is multiplied by an odd number that depends on
    its place, in integers that wrap around: a change of one word always changes the sum, and one of
    several all but always. Integer sums are the same in whatever order a device adds.
    """
    flat = _bytes_of(memory)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    total = torch.zeros((), dtype=torch.int64, device=memory.device)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        part = words[start : start + _WORDS_AT_ONCE].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=memory.device)
        # Odd, so that it can be divided by modulo 2**64: no difference of one word is multiplied
        # away. The golden ratio spreads neighbours over all 64 bits.
        total += (part * ((places * _GOLDEN) | 1)).sum()
    return total


_GOLDEN = -0x61C8864680B583EB  # 2**64 divided by the golden ratio, as a signed number


def _host_digest(memory: torch.Tensor) -> bytes:
    # Zero-copy where the tensor is contiguous, as nearly all are.
    return xxhash.xxh3_64_digest(_bytes_of(memory).numpy().data)


def _bytes_of(memory: torch.Tensor) -> torch.Tensor:
    # Bits, not numbers: two NaNs may be equal replicas, and 0.0 and -0.0 are not.
    flat = memory.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _fetch(sums: Sequence[torch.Tensor]) -> list[bytes]:
    by_device: dict[torch.device, list[int]] = {}
    for number, one in enumerate(sums):
        by_device.setdefault(one.device, []).append(number)
    out = [b""] * len(sums)
    for numbers in by_device.values():
        values = torch.stack([sums[number] for number in numbers]).cpu().numpy()
        for number, value in zip(numbers, values.astype(np.int64), strict=True):
            out[number] = value.tobytes()
    return out


def _differ(held: Held, rank: int, other: int) -> IncompatibleError:
    where = "" if held.sizes == held.shape else f" (its box at {list(held.offsets)})"
    return IncompatibleError(
        f"tensor {held.name!r} of part {held.part!r}{where} has other values on rank {rank} than "
        f"on rank {other}, which hold it as copies of one another: find out why they drifted "
        "apart, or wrap what may differ in PerRank(...)",
        kind=ErrorKind.REPLICAS_DIFFER,
        ranks={rank: f"differs from rank {other}", other: f"differs from rank {rank}"},
    )


def _warn(incomparable: Mapping[str, tuple[int, int]]) -> None:
    if incomparable:
        name, (rank, other) = next(iter(incomparable.items()))
        _log.warning(
            "%d tensors lie on a device on some ranks and in host memory on others (%s, ranks %d "
            "and %d): they were not compared",
            len(incomparable),
            name,
            rank,
            other,
        )
