"""The arena: page-aligned host memory that holds the image of a rank's files."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from dist_ckpt.errors import describe
from dist_ckpt.storage.direct import aligned_buffer
from dist_ckpt.waiting import Worker

Unpin = Callable[[], None]
Pin = Callable[[memoryview], Unpin]
"""Make memory reachable for a device, and return what takes that back."""

_PAGE_BYTES = mmap.PAGESIZE
# Whoever needs the memory while it is being touched waits for one of these: a huge page.
_TOUCH_BYTES = 2 << 20
# A guess that is too large by less than this, and by less than a 32nd, is kept.
_SPARE_BYTES = 16 << 20
_log = logging.getLogger("dist_ckpt")


class Arena:
    """One reusable buffer. A save lays its files into it, one after another, page-aligned.

    The memory stays allocated between saves, so that only the first one could have to pay for page
    faults; and `prewarm` takes them before it. It grows when a save needs more, and what is far
    more than a save needs is given back.
    """

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._used_bytes = 0
        self._touched_bytes = 0
        self._warming: _Warming | None = None
        self._unpin: Unpin | None = None

    @property
    def capacity_bytes(self) -> int:
        """How much memory is held."""
        return 0 if self._memory is None else len(self._memory)

    def prewarm(self, nbytes: int, *, pin: Pin | None = None) -> None:
        """Begin to allocate and touch `nbytes` in the background; less than is held does nothing.

        To be called between saves: the old contents may go.

        Args:
            nbytes: a guess of what the next save needs.
            pin: called when all is touched, on the thread that did it.
        """
        if aligned(nbytes) <= self.capacity_bytes:
            return
        memory = self._make_room(aligned(nbytes))
        self._warming = _Warming(memory, self._touched_bytes, pin)

    def reset(self, nbytes: int, *, pin: Pin | None = None) -> bool:
        """Forget what is laid out and make room for `nbytes` in all, alignment included.

        The caller makes sure that nobody reads the old contents any more.

        Returns:
            Whether it is still the memory of before, so that views of it are of use.
        """
        self._used_bytes = 0
        self._take_over()
        wanted, before = aligned(nbytes), self._memory
        excess = self.capacity_bytes - wanted
        memory = before
        if memory is None or excess < 0 or excess > max(wanted // 32, _SPARE_BYTES):
            memory = self._make_room(wanted)
        if pin is not None and self._unpin is None:
            self._unpin = _pinned(pin, memory)
        # Before the save that will touch it all: what is touched twice costs little.
        self._touched_bytes = wanted
        return memory is before

    def take(self, nbytes: int) -> memoryview:
        """Return the next `nbytes` of the arena, starting on a page; `reset` made the room."""
        start, stop = self._used_bytes, self._used_bytes + nbytes
        if self._memory is None or stop > self.capacity_bytes:
            raise ValueError(f"arena of {self.capacity_bytes} bytes has no room for {nbytes} more")
        self._used_bytes = aligned(stop)
        return self._memory[start:stop]

    def release(self) -> None:
        """Give the memory back, as soon as nobody looks at it any more."""
        self._take_over()
        self._free()

    def _take_over(self) -> None:
        if self._warming is not None:
            # Kept until it has ended: an interrupt while waiting must not leave two writers.
            self._unpin = self._warming.end() or self._unpin
            self._touched_bytes = self._warming.touched_bytes
            self._warming = None

    def _make_room(self, nbytes: int) -> memoryview:
        """Hold exactly `nbytes`, as much as possible of it touched already."""
        self._take_over()
        memory = self._memory
        # Dropped first: the old and the new one together may be more than there is. Dropped, not
        # closed: tensors and views that still look at it keep it alive.
        self._free()
        resized = None if memory is None else _resized(memory, nbytes)
        del memory
        if resized is None:
            self._touched_bytes = 0
            resized = aligned_buffer(nbytes)
        self._touched_bytes = min(self._touched_bytes, nbytes)
        self._memory = resized
        return resized

    def _free(self) -> None:
        self._memory = None
        if self._unpin is not None:
            unpin, self._unpin = self._unpin, None
            unpin()


class _Warming:
    """A thread that touches memory piece by piece until it is told to end."""

    def __init__(self, memory: memoryview, start: int, pin: Pin | None) -> None:
        self.touched_bytes = start
        self._memory = memory
        self._pin = pin
        self._stop = False
        self._unpin: Unpin | None = None
        # A daemon: nothing is lost when the process goes before all is touched.
        self._touching = Worker(self._run, name="dist_ckpt-arena", daemon=True)
        # Where no more threads can be had, the first save takes the page faults.
        with suppress(RuntimeError):
            self._touching.start()

    def end(self) -> Unpin | None:
        """End at the piece in progress; return how to unpin what was pinned."""
        self._stop = True
        self._touching.wait()
        return self._unpin

    def _run(self) -> None:
        # numpy lets the training thread run while it takes the page faults.
        pages = np.frombuffer(self._memory, dtype=np.uint8)
        while self.touched_bytes < len(pages):
            if self._stop:
                return
            stop = min(self.touched_bytes + _TOUCH_BYTES, len(pages))
            pages[self.touched_bytes : stop : _PAGE_BYTES] = 0
            self.touched_bytes = stop
        # Released, or the memory could not be resized.
        del pages
        if self._pin is not None and not self._stop:
            self._unpin = _pinned(self._pin, self._memory)


def _resized(memory: memoryview, nbytes: int) -> memoryview | None:
    """Let the kernel move the pages, so that they need not be touched again; None if it cannot."""
    mapping = memory.obj
    if not isinstance(mapping, mmap.mmap):
        return None
    try:
        memory.release()
        mapping.resize(nbytes)
    except (BufferError, ValueError, OSError, SystemError):
        # Somebody looks at it, there is no room, or the system has no mremap.
        return None
    return memoryview(mapping)


def _pinned(pin: Pin, memory: memoryview) -> Unpin:
    try:
        return pin(memory)
    except (RuntimeError, OSError) as error:
        # Slower, and as right: copies to such memory block the thread that asks for them.
        _log.warning(
            "the %d bytes of the arena could not be pinned (limit: ulimit -l), copies from the "
            "device will be slower: %s",
            len(memory),
            describe(error),
        )
        return _nothing


def _nothing() -> None:
    pass


def aligned(nbytes: int) -> int:
    """Round up to whole pages, at least one (a mapping cannot be empty)."""
    return max(-(-nbytes // _PAGE_BYTES), 1) * _PAGE_BYTES


def as_tensor(
    buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> torch.Tensor:
    """Return a tensor over `buffer` from byte `offset` on, without a copy; `shape` is not empty."""
    count = math.prod(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
