"""A file before it exists: which bytes come where, made window by window while it is stored.

No more of a file than a few windows is ever in memory, whatever it and its tensors measure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch

from dist_ckpt.doors.content import Item, Outgoing
from dist_ckpt.loading.opened import BoxTarget
from dist_ckpt.storage.base import Stream
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import Worker

_AHEAD = 2
"""How many windows are read while others are stored."""

WINDOW_BYTES = 16 << 20
"""How much of a file is made at a time: of a source that lies otherwise, two windows read the block
between them. Every element begins and ends in one window: a tensor lies at a multiple of its item,
and so do windows."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that stand at `offset`: of a tensor, or what `make` returns.

    Attributes:
        offset: where in the file.
        nbytes: how many there are.
        item: the tensor; None for other bytes.
        make: returns these; asked once, when all before them was made.
        seen: told of the bytes of the tensor as they are made, in order.
    """

    offset: int
    nbytes: int
    item: Item | None = None
    make: Callable[[], bytes] = bytes
    seen: Callable[[memoryview], None] = field(default=lambda _: None)

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.nbytes


class Image:
    """What a file will be: spans in ascending order, and zeros between them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.nbytes = 0

    def skip_to(self, offset: int) -> None:
        """Let what follows begin at `offset`."""
        self.nbytes = offset

    def add_bytes(self, data: bytes) -> None:
        """Let `data` follow."""
        self.add_late(len(data), lambda: data)

    def add_late(self, nbytes: int, make: Callable[[], bytes]) -> None:
        """Let `nbytes` follow that are known when all before them was made."""
        self._add(Span(self.nbytes, nbytes, make=make))

    def add_tensor(self, item: Item, seen: Callable[[memoryview], None] = lambda _: None) -> None:
        """Let the elements of a tensor follow, at a multiple of the size of one."""
        assert not self.nbytes % max(1, item.dtype.itemsize)
        self._add(Span(self.nbytes, item.nbytes, item, seen=seen))

    def spans_between(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the spans that have bytes in `start:stop`, in order."""
        first = bisect_right(self.spans, start, key=lambda span: span.stop)
        for span in islice(self.spans, first, None):
            if span.offset >= stop:
                return
            yield span

    def _add(self, span: Span) -> None:
        if span.nbytes:
            self.spans.append(span)
            self.nbytes = span.stop


@dataclass(frozen=True)
class Drawing:
    """A file to be stored: what draws its image, and where the tensors come from.

    Attributes:
        draw: returns the image, a new one at each call: what it notes of its bytes is of one way
            through them.
        content: the tensors.
    """

    draw: Callable[[], Image]
    content: Outgoing

    @cached_property
    def nbytes(self) -> int:
        """The size of the file."""
        return self.draw().nbytes

    def stream(self, seen: Callable[[memoryview], None] = lambda _: None) -> Stream:
        """Return the file as it can be stored; `seen` is told of each window, in order."""

        def pieces() -> Iterator[memoryview]:
            for window in windows(self.draw(), self.content):
                seen(window)
                yield window

        return Stream(self.nbytes, pieces)


class _Window:
    """One window in the making: its tensors are read on a thread of its own."""

    def __init__(self, image: Image, content: Outgoing, start: int) -> None:
        self._start = start
        self._memory = aligned_buffer(min(WINDOW_BYTES, image.nbytes - start))
        self._spans = list(image.spans_between(start, start + self._memory.nbytes))
        self._content = content
        self._error: BaseException | None = None
        self._reading = Worker(self._read, name="dist_ckpt-io", daemon=True)
        try:
            self._reading.start()
        except RuntimeError:  # no more threads can be had
            self._read()

    def _read(self) -> None:
        try:
            targets = _targets(self._spans, self._start, self._memory)
            if targets:
                self._content.fill(targets)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until nobody writes to it any more."""
        self._reading.wait()

    def finish(self, late: dict[int, bytes]) -> memoryview:
        """Return its bytes, when those of all windows before were returned.

        Args:
            late: what was made for the window before and goes on in this one.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        start, stop = self._start, self._start + self._memory.nbytes
        for span in self._spans:
            low, high = max(span.offset, start), min(span.stop, stop)
            if span.item is not None:
                span.seen(self._memory[low - start : high - start])
                continue
            data = late.pop(span.offset, None) or span.make()
            if span.stop > stop:
                late[span.offset] = data
            here = data[low - span.offset : high - span.offset]
            self._memory[low - start : high - start] = here
        return self._memory


def windows(image: Image, content: Outgoing) -> Iterator[memoryview]:
    """Yield the bytes of `image` in windows, each in memory of its own.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    late: dict[int, bytes] = {}
    ahead: deque[_Window] = deque()
    try:
        for start in range(0, image.nbytes, WINDOW_BYTES):
            ahead.append(_Window(image, content, start))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().finish(late)
        while ahead:
            yield ahead.popleft().finish(late)
    finally:
        # The store that is read from may be closed after this.
        for window in ahead:
            window.wait()


def _targets(spans: Sequence[Span], start: int, window: memoryview) -> list[BoxTarget]:
    """Return the boxes of tensors that make up `window`, and their places in it."""
    memory = torch.frombuffer(window, dtype=torch.uint8)
    found: list[BoxTarget] = []
    for span in spans:
        if span.item is None:
            continue
        low, high = max(span.offset, start), min(span.stop, start + window.nbytes)
        size = span.item.dtype.itemsize
        at = low - start
        for offsets, sizes in boxes_of_range(
            span.item.shape, (low - span.offset) // size, (high - span.offset) // size
        ):
            end = at + math.prod(sizes) * size
            box = memory[at:end].view(span.item.dtype).view(sizes)
            found.append((span.item.name, offsets, box))
            at = end
    return found


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield boxes, as offsets and sizes, whose elements in order are those of a range.

    Args:
        shape: of a tensor whose last dimension is innermost.
        start: number of the first element.
        stop: one behind that of the last.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row, rest = divmod(start, inner)
    if rest or stop - start < inner:
        # The end of a row, or less than one.
        end = min(stop, (row + 1) * inner)
        for offsets, sizes in boxes_of_range(shape[1:], rest, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        yield from boxes_of_range(shape, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from boxes_of_range(shape, start + rows * inner, stop)
