"""Several buffers that are filled as if they were one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Scatter:
    """Flat views of bytes, thought of as one after another.

    Args:
        views: where the bytes go; empty ones count for nothing.

    Attributes:
        nbytes: how many bytes the views have together.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view for view in views if view.nbytes]
        self._stops = list(accumulate(view.nbytes for view in self._views))
        self.nbytes = self._stops[-1] if self._stops else 0

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Copy `data` to the bytes from `start` on; it does not reach beyond the end."""
        views = self.cut(start, start + len(data))
        if len(views) == 1:  # nearly always: what arrives at once is small
            views[0][:] = data
            return
        source, done = memoryview(data), 0
        for view in views:
            view[:] = source[done : done + view.nbytes]
            done += view.nbytes

    def cut(self, start: int, stop: int) -> list[memoryview]:
        """Return views of the bytes from `start` up to, not including, `stop`."""
        found = []
        number = bisect_right(self._stops, start)
        while start < stop and number < len(self._views):
            view, end = self._views[number], self._stops[number]
            first = start - (end - view.nbytes)
            last = min(stop, end) - (end - view.nbytes)
            found.append(view if last - first == view.nbytes else view[first:last])
            start, number = end, number + 1
        return found
