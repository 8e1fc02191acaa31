"""Ctrl-C while a save is written: the process ends, and what is listed is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore

ROOT = Path(__file__).resolve().parents[2]

# Says where it is on standard output; a line on standard input lets the put come to its end.
PROGRAM = """
import signal, sys, threading
import torch
import dist_ckpt
from dist_ckpt.storage.local import LocalStore
from tests.unit.engine.slow_store import EndlessPut

class Loud(dist_ckpt.Checkpointer):
    def close(self):
        print("closing", flush=True)
        super().close()

store = EndlessPut(LocalStore(sys.argv[1]), "step-0000000001/*/weights.*")

def let_go():
    if sys.stdin.readline():
        store.let_go.set()

threading.Thread(target=let_go, daemon=True).start()
with Loud(store, {"weights": {"w": torch.ones(1_000_000)}}) as ckpt:
    ckpt.save(1)
    store.reached.wait()
    print("writing", flush=True)
    while True:
        signal.pause()
"""


@contextmanager
def running(root: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def interrupt(child: subprocess.Popen[str], *, when: str) -> None:
    """Press Ctrl-C once the program has said so."""
    stream = child.stdout if when in ("writing", "closing") else child.stderr
    assert stream is not None
    for line in stream:
        if when in line:
            child.send_signal(signal.SIGINT)
            return
    raise AssertionError(f"the program never said {when!r}")


def test_a_save_in_flight_is_committed_and_one_who_insists_is_obeyed(tmp_path: Path) -> None:
    patient, hasty = tmp_path / "patient", tmp_path / "hasty"
    with running(patient) as first, running(hasty) as second:
        interrupt(first, when="writing")
        interrupt(second, when="writing")
        # Once: leaving the block finishes the save, and the interrupt goes on its way.
        assert first.stdout is not None
        assert first.stdout.readline() == "closing\n"
        _, said = first.communicate("let go\n")
        assert first.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in said
        # Twice: the end of the process still waits, and says so. Three times: it is given up.
        interrupt(second, when="closing")
        interrupt(second, when="interrupt it to give that up")
        _, said = second.communicate()
        assert second.returncode == -signal.SIGINT
        assert "ignored" not in said, "nothing may fail while the interpreter ends"
    assert Repository(LocalStore(patient)).steps() == [1]
    assert Repository(LocalStore(patient)).verify(1).ok
    assert Repository(LocalStore(hasty)).steps() == []
    left = [path for path in hasty.rglob("*") if path.is_file() and path.parent.name != "claims"]
    assert left == [], "no unfinished file either"
