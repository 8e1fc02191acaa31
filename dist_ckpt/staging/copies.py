"""Copies of many tensors into the arena: at once, or in flight while training goes on.

The one seam between staging and a device. `HostCopies` serves whatever torch can copy by itself;
`CudaCopies` enqueues on a stream of its own and lets the device do the waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from dist_ckpt.staging.arena import Pin
from dist_ckpt.staging.pinning import pin_for

Tensors = Sequence[torch.Tensor]


class InFlight(Protocol):
    """Copies that run beside the training."""

    def begin(self) -> None:
        """Begin; called once."""
        ...

    def wait(self) -> None:
        """Block until all are done; raise what failed, each time."""
        ...

    def before_change(self) -> None:
        """Let what this thread does to the sources next come after the copies; never raises."""
        ...


class CopyEngine(Protocol):
    """How tensors of one device come into host memory.

    Attributes:
        pin: what makes the arena fit for the fastest copies, None if nothing has to be done.
    """

    pin: Pin | None

    def copy(self, targets: Tensors, sources: Tensors) -> None:
        """Fill each of `targets` from the one of `sources` beside it, of equal dtype and shape."""
        ...

    def prepare(self, targets: Tensors, sources: Tensors) -> InFlight:
        """Return what will do as `copy`; the sources must not change before it is done."""
        ...


class HostCopies:
    """Copies by this process: from host memory, and from devices of which torch hides the rest."""

    pin: Pin | None = None

    def copy(self, targets: Tensors, sources: Tensors) -> None:
        """See `CopyEngine.copy`."""
        _copy_all(targets, sources, non_blocking=False)

    def prepare(self, targets: Tensors, sources: Tensors) -> InFlight:
        """See `CopyEngine.prepare`; a thread copies, and leaves the interpreter to others."""
        return _HostCopying(targets, sources)


class _HostCopying:
    """A thread that copies."""

    def __init__(self, targets: Tensors, sources: Tensors) -> None:
        self._pairs: tuple[Tensors, Tensors] | None = (targets, sources)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        # No daemon: it ends by itself, and must not use memory after the interpreter is gone.
        thread = threading.Thread(target=self._run, name="dist_ckpt-copy")
        try:
            thread.start()
        except RuntimeError:
            self._run()  # no more threads can be had, as when the interpreter ends
            return
        self._thread = thread

    def wait(self) -> None:
        self.before_change()
        if self._error is not None:
            raise self._error

    def before_change(self) -> None:
        # Joined, not waited for by an event: in a forked child the thread counts as ended.
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pairs, self._pairs = self._pairs, None
        try:
            if pairs is not None:
                _copy_all(*pairs, non_blocking=False)
        except BaseException as error:  # for whoever waits: a thread has nobody above it
            self._error = error


class CudaCopies:
    """Copies from one CUDA device on a stream of its own, beside the training."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pin: Pin | None = pin_for(device)

    def copy(self, targets: Tensors, sources: Tensors) -> None:
        """See `CopyEngine.copy`; the device copies in the order of the current stream."""
        copying = self.prepare(targets, sources)
        copying.begin()
        copying.wait()

    def prepare(self, targets: Tensors, sources: Tensors) -> InFlight:
        """See `CopyEngine.prepare`."""
        return _CudaCopying(self._device, self._stream, targets, sources)


class _CudaCopying:
    """Copies on a side stream, and the event at their end."""

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream, targets: Tensors, sources: Tensors
    ) -> None:
        self._device = device
        self._stream = stream
        # Kept for as long as this is: the device writes to memory that it does not own.
        self._targets = targets
        self._sources = sources
        self._done: torch.cuda.Event | None = None

    def begin(self) -> None:
        sources, self._sources = self._sources, ()
        # What was enqueued before the save belongs to what is saved.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                _copy_all(self._targets, sources, non_blocking=True)
        finally:
            # Also when it failed half-way: some copies are on their way.
            for source in sources:
                # The allocator must not give freed memory to others while this stream reads it.
                source.record_stream(self._stream)
            self._done = self._stream.record_event()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def before_change(self) -> None:
        # The device waits, this thread does not.
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


def engine_for(device: torch.device) -> CopyEngine:
    """Return what copies from `device`."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


def _copy_all(targets: Tensors, sources: Tensors, *, non_blocking: bool) -> None:
    with torch.no_grad():
        # One call for all: no work of Python between two tensors, and the interpreter is free.
        torch._foreach_copy_(list(targets), list(sources), non_blocking=non_blocking)
