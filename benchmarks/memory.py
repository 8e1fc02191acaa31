"""The memory that a program takes, with the processes that it started."""

from __future__ import annotations

import re
import threading
from pathlib import Path

_SAMPLE_SECONDS = 0.02


class Peak:
    """Looks for the most memory that this process and those it started have, above the start.

    Proportional to how many share a page, so that memory shared between two counts once. Huge
    pages count in full.
    """

    def __init__(self) -> None:
        self._before = _tree_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.nbytes = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self.nbytes = max(self.nbytes, _tree_bytes() - self._before)


def _tree_bytes() -> int:
    total, waiting = 0, ["self"]
    while waiting:
        process = Path("/proc") / waiting.pop()
        try:
            used = (process / "smaps_rollup").read_text()
            found = re.search(r"^Pss:\s+(\d+) kB", used, re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
            for children in process.glob("task/*/children"):
                waiting += children.read_text().split()
        except OSError:
            continue  # it ended while it was looked at
    return total
