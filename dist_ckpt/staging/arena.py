"""The arena: page-aligned host memory that holds the image of a rank's files."""

from __future__ import annotations

import mmap

import torch

from dist_ckpt.storage.direct import aligned_buffer

_PAGE_BYTES = mmap.PAGESIZE


class Arena:
    """One reusable buffer. A save lays its files into it, one after another, page-aligned.

    The memory stays allocated between saves, so only the first one pays for page faults; it grows
    when a save needs more and never shrinks.
    """

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._used_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """How much memory is held."""
        return 0 if self._memory is None else len(self._memory)

    def reset(self, nbytes: int) -> None:
        """Forget what is laid out and make room for `nbytes` in all, alignment included.

        The caller makes sure that nobody reads the old contents any more.
        """
        self._used_bytes = 0
        if nbytes > self.capacity_bytes:
            # Dropped, not closed: tensors and views that still look at it keep it alive. And
            # dropped first: the old and the new one together may be more than there is.
            self._memory = None
            self._memory = aligned_buffer(aligned(nbytes))

    def take(self, nbytes: int) -> memoryview:
        """Return the next `nbytes` of the arena, starting on a page; `reset` made the room."""
        start, stop = self._used_bytes, self._used_bytes + nbytes
        if self._memory is None or stop > self.capacity_bytes:
            raise ValueError(f"arena of {self.capacity_bytes} bytes has no room for {nbytes} more")
        self._used_bytes = aligned(stop)
        return self._memory[start:stop]


def aligned(nbytes: int) -> int:
    """Round up to whole pages, at least one (a mapping cannot be empty)."""
    return max(-(-nbytes // _PAGE_BYTES), 1) * _PAGE_BYTES


def as_tensor(
    buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> torch.Tensor:
    """Return a tensor over `buffer` from byte `offset` on, without a copy; `shape` is not empty."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
