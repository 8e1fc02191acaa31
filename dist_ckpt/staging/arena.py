"""The arena: page-aligned host memory that holds the image of a rank's files, and copies into it.

The copies are the one seam between staging and a device. `HostCopies` serves whatever torch can
copy by itself; `CudaCopies` enqueues on a stream of its own and lets the device do the waiting.
`hold_steps` keeps optimizers from changing what is being copied, and `no_collection` the collector
of garbage from slowing all this down.
"""

from __future__ import annotations

import gc
import logging
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dist_ckpt.errors import UsageError, describe
from dist_ckpt.format.index import Box
from dist_ckpt.staging.checksum import checksum
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import Worker

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


# What of a live tensor a box names, and how much memory that spans.


def view_box(tensor: torch.Tensor, box: Box, *, origin: tuple[int, ...]) -> torch.Tensor:
    """Return the view of `tensor` that `box` names, `origin` being where the tensor starts."""
    view = tensor.detach()
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        view = view.narrow(dim, offset - origin[dim], size)
    return view


def reach(tensor: torch.Tensor) -> int:
    """Return how many elements of memory a tensor with elements spans, gaps between them too."""
    if tensor.is_contiguous():
        return tensor.numel()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


# Page-locked host memory, which a CUDA device reads and writes by itself.


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not for the current one alone


def pin_for(device: torch.device) -> Pin:
    """Return what pins memory for copies from `device`."""

    def pin(memory: memoryview) -> Unpin:
        # On another thread device 0 is the current one, and a call there would open it.
        with torch.cuda.device(device):
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(runtime.cudaHostRegister(address, len(memory), _PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister refused with error {code}")
        return lambda: _unpin(address, device)

    return pin


def pin_of(devices: Iterable[torch.device]) -> Pin | None:
    """Return what makes memory fit for the fastest copies from `devices`; None for nothing."""
    # Pinned for one device is pinned for all of its kind.
    return next((pin_for(each) for each in devices if each.type == "cuda"), None)


def _unpin(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


# Copies of many tensors into the arena: at once, or in flight while training goes on.


_Tensors = Sequence[torch.Tensor]


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
    """How tensors of one device come into host memory."""

    def copy(self, targets: _Tensors, sources: _Tensors) -> None:
        """Fill each of `targets` from the one of `sources` beside it, of equal dtype and shape."""
        ...

    def prepare(self, targets: _Tensors, sources: _Tensors, names: Sequence[str]) -> InFlight:
        """Return what will do as `copy`, of the values that the sources have when it begins.

        A step of an optimizer waits for it. Whatever else changes a source meanwhile either does
        not reach the target, or `InFlight.wait` raises and says which source it was.

        Args:
            targets: see `copy`.
            sources: see `copy`.
            names: of the sources, for messages.
        """
        ...


class HostCopies:
    """Copies by this process: from host memory, and from devices of which torch hides the rest."""

    def copy(self, targets: _Tensors, sources: _Tensors) -> None:
        """See `CopyEngine.copy`."""
        copy_all(targets, sources, non_blocking=False)

    def prepare(self, targets: _Tensors, sources: _Tensors, names: Sequence[str]) -> InFlight:
        """See `CopyEngine.prepare`; a thread copies, and leaves the interpreter to others."""
        return HostCopying(targets, sources)


class HostCopying:
    """A thread that copies from memory which torch moves every writer away from.

    Args:
        targets: where to.
        sources: what is copied.
    """

    def __init__(self, targets: _Tensors, sources: _Tensors) -> None:
        self._targets = targets
        self._sources = sources
        self._pairs: tuple[_Tensors, _Tensors] | None = None
        self._error: BaseException | None = None
        self._copying: Worker | None = None

    def begin(self) -> None:
        """See `InFlight.begin`."""
        self._pairs = self._freeze()
        # No daemon: it ends by itself, and must not use memory after the interpreter is gone.
        self._copying = Worker(self._run, name="dist_ckpt-copy", daemon=False)
        try:
            self._copying.start()
        except RuntimeError:
            self._run()  # no more threads can be had, as when the interpreter ends

    def wait(self) -> None:
        """See `InFlight.wait`."""
        self.before_change()
        if self._error is not None:
            raise self._error

    def before_change(self) -> None:
        """See `InFlight.before_change`; this thread waits."""
        if self._copying is not None:
            self._copying.wait()

    def _freeze(self) -> tuple[_Tensors, _Tensors]:
        """Return what can be copied later; the rest is copied now."""
        targets, sources = self._targets, self._sources
        self._targets = self._sources = ()
        frozen = [_frozen(source) for source in sources]
        later: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        now: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for target, source, clone in zip(targets, sources, frozen, strict=True):
            chosen, value = (now, source) if clone is None else (later, clone)
            chosen[0].append(target)
            chosen[1].append(value)
        copy_all(*now, non_blocking=False)
        return later

    def _run(self) -> None:
        # Dropped with the end of this function: from then on a writer takes the memory as it is.
        pairs, self._pairs = self._pairs, None
        try:
            if pairs is not None:
                copy_all(*pairs, non_blocking=False)
        except BaseException as error:  # for whoever waits: a thread has nobody above it
            self._error = error


class CudaCopies:
    """Copies from one CUDA device on a stream of its own, beside the training."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, targets: _Tensors, sources: _Tensors) -> None:
        """See `CopyEngine.copy`; the device copies in the order of the current stream."""
        # Nameless: this thread waits, so nothing can change beside the copies.
        copying = self.prepare(targets, sources, ())
        copying.begin()
        copying.wait()

    def prepare(self, targets: _Tensors, sources: _Tensors, names: Sequence[str]) -> InFlight:
        """See `CopyEngine.prepare`."""
        return _CudaCopying(self._device, self._stream, targets, sources, names)


class _CudaCopying:
    """Copies on a side stream, and the event at their end.

    Device memory cannot be moved away from under a writer, as host memory is: graphs and
    communicators know its address. So what has a name is summed up before the copies, in the order
    of the training, and after them, in that of the copies.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream,
        targets: _Tensors,
        sources: _Tensors,
        names: Sequence[str],
    ) -> None:
        self._device = device
        self._stream = stream
        # Kept for as long as this is: the device writes to memory that it does not own.
        self._targets = targets
        self._sources = sources
        self._names = names
        self._sums: tuple[_Tensors, _Tensors] = ((), ())
        self._changed: str | None = None
        self._done: torch.cuda.Event | None = None

    def begin(self) -> None:
        sources, self._sources = self._sources, ()
        # On the stream of the training: whatever is enqueued there later comes after these.
        before = [checksum(source) for source in sources] if self._names else []
        # What was enqueued before the save belongs to what is saved.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                copy_all(self._targets, sources, non_blocking=True)
                # Behind the copies: a change before or during one shows here, unless it was undone
                # before the device came to this sum.
                after = [checksum(source) for source in sources] if self._names else []
            self._sums = before, after
        finally:
            # Also when it failed half-way: some copies are on their way.
            for source in sources:
                # The allocator must not give freed memory to others while this stream reads it.
                source.record_stream(self._stream)
            self._done = self._stream.record_event()

    def wait(self) -> None:
        if self._done is None:
            return
        self._done.synchronize()
        if self._changed is None:
            self._changed = self._find_changed()
        if self._changed:
            raise UsageError(
                f"{self._changed} was changed between the save and the next step of an optimizer, "
                'while it was being copied: save with staging="blocking", or change it before '
                "save() or after the step"
            )

    def before_change(self) -> None:
        # The device waits, this thread does not.
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def _find_changed(self) -> str:
        """Return the name of the first source that changed, "" for none."""
        (before, after), self._sums = self._sums, ((), ())
        if not before:
            return ""
        # On the stream of the copies, not to wait for the training.
        with torch.cuda.stream(self._stream):
            equal = (torch.stack(list(before)) == torch.stack(list(after))).tolist()
        return next((name for name, same in zip(self._names, equal, strict=True) if not same), "")


def engine_for(device: torch.device) -> CopyEngine:
    """Return what copies from `device`."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


def copy_all(targets: _Tensors, sources: _Tensors, *, non_blocking: bool) -> None:
    """Fill each of `targets` from the one of `sources` beside it; all copies are made here.

    Args:
        targets: where to.
        sources: what is copied.
        non_blocking: whether a device may still be copying at the return.
    """
    if not targets:
        return
    with torch.no_grad():
        # One call for all: no work of Python between two tensors, and the interpreter is free.
        torch._foreach_copy_(list(targets), list(sources), non_blocking=non_blocking)


def _frozen(source: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor that keeps the values of `source`, and shares its memory while it can.

    Whoever writes to that memory through torch first gets a copy of its own (copy on write): in
    place, through `.data` or a view, by resizing it to nothing. None where torch cannot do that:
    memory of files, of other processes, or that numpy knows the address of.

    Torch 2.13 refuses to write, by an internal assertion, to a storage that was resized while it
    was shared like this: that raises in the program that does it, and nothing wrong is stored.
    """
    if not source.untyped_storage().resizable():
        return None  # numpy writes to it past torch
    try:
        # No public call does this; without it the copy is made at once.
        return torch._lazy_clone(source.detach())  # noqa: SLF001
    except (RuntimeError, AttributeError):
        return None


# Optimizer steps wait for copies in flight: nobody has to remember a call.
#
# One hook for all optimizers of the process, and not one for each optimizer of a state: a wrapper
# or a second optimizer may step the same parameters. It is registered once and never removed,
# because torch walks its hooks without a lock, and removing one on another thread would break
# that walk.


_lock = threading.Lock()
_registered = False
# Added to and taken from in single operations, which threads cannot see half done.
_in_flight: dict[int, Sequence[InFlight]] = {}


def hold_steps(copies: Sequence[InFlight]) -> None:
    """Let no optimizer step change anything before `copies` are done."""
    global _registered
    with _lock:
        if not _registered:
            # Not to be compiled into a compiled step, which would be compiled anew for each save.
            register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))  # type: ignore[no-untyped-call]
            _registered = True
    _in_flight[id(copies)] = copies


def release_steps(copies: Sequence[InFlight]) -> None:
    """Hold steps no longer for `copies`."""
    _in_flight.pop(id(copies), None)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for copies in tuple(_in_flight.values()):
        for copying in copies:
            copying.before_change()


# The collector of cyclic garbage, kept out of saves and loads.


@contextmanager
def no_collection() -> Iterator[None]:
    """Put the collection of cyclic garbage off until the block ends, in the whole process.

    A first save or load makes thousands of small objects, and they set off the collection that all
    imports of a program are waiting for: 0.2 s, more than the copy of a gigabyte takes. Where two
    threads overlap here it may begin again too early, which costs time and nothing else.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
