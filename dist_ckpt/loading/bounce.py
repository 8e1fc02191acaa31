"""Bounce buffers: aligned host memory that bytes pass through on their way to tensors."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import torch

from dist_ckpt.staging.arena import Arena, aligned

_KEPT_BYTES = 64 << 20
"""How much memory a process keeps for its next load, at most."""

_kept: list[Arena] = []  # one at most


class BounceMemory:
    """Memory for bounce buffers, touched in the background from the moment this is made.

    A new page costs the kernel more than reading into it: where a reader is going to be busy with
    something else for a while, its memory is made ready meanwhile. And what was used up to the end
    of the context is kept for the next one of this process: up to 64 MiB.

    Args:
        nbytes: a guess of how much it will be; 0 if it may be none.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._arena = _taken() if nbytes else Arena()
        if nbytes:
            self._arena.prewarm(nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        # After a failure something given up may still write to it: then nobody else may use it.
        if failed is None and 0 < self._arena.capacity_bytes <= _KEPT_BYTES:
            self._arena.reset(self._arena.capacity_bytes)  # nobody touches it any more
            _kept[:] = [self._arena]
            self._arena = Arena()
        self.release()

    def release(self) -> None:
        """Give the memory back, as soon as nobody looks at its buffers any more."""
        self._arena.release()

    def cut(self, count: int, nbytes: int) -> list[memoryview]:
        """Return `count` buffers of `nbytes`, each from a page on; those of before are void."""
        self._arena.reset(count * aligned(nbytes))
        return [self._arena.take(nbytes) for _ in range(count)]


def _taken() -> Arena:
    try:
        return _kept.pop()  # atomic: of two loads at once one gets it
    except IndexError:
        return Arena()


@dataclass(frozen=True, slots=True)
class BounceBuffer:
    """Memory to read to, and the streams of the GPUs by which it is copied on.

    Attributes:
        memory: begins on a page.
        streams: one for each GPU; none where bytes go to host memory only.
    """

    memory: memoryview
    streams: Sequence[torch.cuda.Stream]


class BounceBuffers:
    """A few buffers that are borrowed in turn; only their first use pays for the memory.

    One thread may fill a buffer and another one empty it. Where bytes go on to a GPU the memory is
    pinned, and they go by a stream beside that of the training, so that copies run along with
    reads.

    Args:
        count: how many buffers there are.
        nbytes: the size of each; it begins on a page.
        devices: where bytes may go on to.
        memory: what to make them of, if they need not be pinned; None for memory of their own.
    """

    def __init__(
        self,
        count: int,
        nbytes: int,
        *,
        devices: Sequence[torch.device],
        memory: BounceMemory | None = None,
    ) -> None:
        gpus = [device for device in devices if device.type == "cuda"]
        self._free: queue.SimpleQueue[BounceBuffer] = queue.SimpleQueue()
        buffers = None if gpus else (memory or BounceMemory()).cut(count, nbytes)
        for number in range(count):
            streams = [torch.cuda.Stream(device) for device in gpus]  # type: ignore[no-untyped-call]
            for stream in streams:
                # What the training still does to a target is over before bytes get there.
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            view = _pinned(nbytes) if buffers is None else buffers[number]
            self._free.put(BounceBuffer(view, streams))

    def take(self) -> BounceBuffer:
        """Borrow a buffer, which `using` gives back; waits while all are lent."""
        return self._free.get()

    @contextmanager
    def using(self, buffer: BounceBuffer) -> Iterator[None]:
        """Copy out of `buffer` inside of this: copies begun here are over when it is given back."""
        try:
            with ExitStack() as stack:
                for stream in buffer.streams:
                    stack.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            for stream in buffer.streams:
                # The next borrower writes to this memory: no copy may still read from it.
                stream.synchronize()
            self._free.put(buffer)


def _pinned(nbytes: int) -> memoryview:
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    view: memoryview = memory.numpy().data
    return view
