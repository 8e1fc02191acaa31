"""A checksum of memory where it lies: on a device it is computed there, and nothing is copied."""

from __future__ import annotations

from functools import cache

import torch

WORDS_AT_ONCE = 1 << 21
"""How many words are widened to 64 bits at a time: 16 MiB of weights and as much of products."""

# 2**64 divided by the golden ratio, as a signed number: it spreads neighbours over all 64 bits.
_GOLDEN = -0x61C8864680B583EB


def checksum(memory: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit checksum of `memory` as an int64 tensor on its device; nothing is awaited.

    Each 32-bit word (or byte, where they do not fit) is multiplied by an odd number that depends on
    its place, in integers that wrap around: a change of one word always changes the sum, and one of
    several all but always. Integer sums are the same in whatever order a device adds.
    """
    flat = bytes_of(memory)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    total = torch.zeros((), dtype=torch.int64, device=memory.device)
    weights = _weights(memory.device, WORDS_AT_ONCE)
    for start in range(0, words.numel(), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        # Few and large operations: a device is told one by one what to do.
        total = total * _GOLDEN + (part * weights[: len(part)]).sum()
    return total


def bytes_of(memory: torch.Tensor) -> torch.Tensor:
    """Return `memory` as uint8[n] in C order: itself where that is possible, else a copy.

    Bits, not numbers: two NaNs may be equal replicas, and 0.0 and -0.0 are not.
    """
    flat = memory.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


@cache
def _weights(device: torch.device, count: int) -> torch.Tensor:
    # Odd, so that it can be divided by modulo 2**64: no difference of one word is multiplied away.
    return (torch.arange(1, count + 1, device=device) * _GOLDEN) | 1
