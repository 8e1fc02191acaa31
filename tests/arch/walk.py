"""What a steady save, a restore and a read of a slice enter of the package, in order.

Run as a program with a folder, it prints the three walks as JSON: `[module, function]` by the first
time that each function is entered, on whichever thread.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

import dist_ckpt
from dist_ckpt import Checkpointer, keep
from tests.arch.source import PACKAGE

Walk = list[tuple[str, str]]


class Tracer:
    """Notes each function of the package that is entered while it listens."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], None] | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        seen = self._seen
        if event != "call" or seen is None:
            return
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if path.startswith(f"{PACKAGE}/") and "<" not in name:
            seen.setdefault((path.removeprefix(f"{PACKAGE}/"), name))

    def walk(self, work: Callable[[], object]) -> Walk:
        """Return what `work` enters."""
        found: dict[tuple[str, str], None] = {}
        self._seen = found
        work()
        self._seen = None
        return list(found)


def walks(folder: Path) -> dict[str, Walk]:
    tracer = Tracer()
    # Before the first thread of the package: threads that run already are not heard.
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(folder, state, keep=keep.latest(2)) as ckpt:
        ckpt.restore()
        for step in range(1, 4):
            save_and_tidy_up(ckpt, step)  # so that nothing of it is heard in the next one
        save = tracer.walk(lambda: save_and_tidy_up(ckpt, 4))
    with Checkpointer(folder, state, keep=keep.latest(2)) as ckpt:
        restore = tracer.walk(ckpt.restore)
    read = tracer.walk(lambda: slice_of(folder))
    return {"save": save, "restore": restore, "slice": read}


def save_and_tidy_up(ckpt: Checkpointer, step: int) -> None:
    ckpt.save(step)
    ckpt.wait()


def slice_of(folder: Path) -> torch.Tensor:
    with dist_ckpt.open_checkpoint(folder) as opened:
        return opened["model/weight"][:1]


if __name__ == "__main__":
    print(json.dumps(walks(Path(sys.argv[1]))))  # noqa: T201
