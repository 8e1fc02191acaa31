"""Ctrl-C while a save is written: the process ends, and what is listed is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch

from dist_ckpt import Checkpointer
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from tests.unit.saving.slow_store import EndlessPut

ROOT = Path(__file__).resolve().parents[2]

# Says on standard output that the save is being written and the main thread waits for something;
# a line on standard input lets the put come to its end.
PROGRAM = """
import sys, threading
import torch
import dist_ckpt
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.threads import Latch
from tests.unit.saving.slow_store import EndlessPut

store = EndlessPut(LocalStore(sys.argv[1]), "step-0000000001/*/weights.*")
state = {"weights": {"w": torch.ones(1_000_000)}}

goes_on_to_wait = []

def say():
    store.reached.wait()
    main = threading.main_thread().ident
    while not goes_on_to_wait or sys._current_frames()[main].f_code.co_name != "wait_for":
        Latch().wait(0.001)
    print("writing", flush=True)
    if sys.stdin.readline():
        store.let_go.set()

threading.Thread(target=say, daemon=True).start()
match sys.argv[2]:
    case "with":
        with dist_ckpt.Checkpointer(store, state) as ckpt:
            ckpt.save(1)
            goes_on_to_wait.append(True)
            Latch().wait()
    case "without":
        ckpt = dist_ckpt.Checkpointer(store, state)
        ckpt.save(1)
        goes_on_to_wait.append(True)
        Latch().wait()
    case "last statement":
        dist_ckpt.async_save(state, store, step=1)
        goes_on_to_wait.append(True)
    case "close":
        ckpt = dist_ckpt.Checkpointer(store, state)
        ckpt.save(1)
        goes_on_to_wait.append(True)
        ckpt.close()
"""
WAITS = "waiting for the save of step 1 to "
GIVES_UP = "interrupt it to give that up"


@contextmanager
def running(root: Path, way: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), way],
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


def interrupt(child: subprocess.Popen[str], *, when: str) -> str:
    """Press Ctrl-C once the program has said so; return the line."""
    stream = child.stdout if when == "writing" else child.stderr
    assert stream is not None
    for line in stream:
        if when in line:
            child.send_signal(signal.SIGINT)
            return line
    raise AssertionError(f"the program never said {when!r}")


WAYS = ("with", "without", "last statement", "close")


@pytest.mark.parametrize(
    "ways", [WAYS[::2], pytest.param(WAYS, marks=pytest.mark.soak)], ids=["two", "all"]
)
def test_the_first_interrupt_says_what_is_waited_for_and_the_second_gives_it_up(
    ways: Sequence[str], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        # Side by side, as each has to import everything.
        found = {way: stack.enter_context(running(tmp_path / way, way)) for way in ways}
        for way, child in found.items():
            interrupt(child, when="writing")
            line = interrupt(child, when=GIVES_UP)
            assert f"{WAITS}{tmp_path / way}" in line
            assert "(writing, " in line
            assert " bytes)" in line
            _, said = child.communicate()
            assert child.returncode == (0 if way == "last statement" else -signal.SIGINT)
            assert "ignored" not in said, "nothing may fail while the interpreter ends"
    for way in ways:
        root = tmp_path / way
        assert Repository(LocalStore(root)).steps() == []
        left = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "claims"]
        assert left == [], "no unfinished file either"


def test_after_one_interrupt_the_save_in_flight_is_committed(tmp_path: Path) -> None:
    with running(tmp_path / "run", "with") as child:
        interrupt(child, when="writing")
        assert child.stderr is not None
        assert GIVES_UP in child.stderr.readline()
        _, said = child.communicate("let go\n")
        assert child.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in said
    assert Repository(LocalStore(tmp_path / "run")).verify(1).ok


def test_an_interrupt_as_the_end_begins_is_not_forgotten_over_the_save(tmp_path: Path) -> None:
    store = EndlessPut(LocalStore(tmp_path), "step-0000000001/*/weights.*")
    ckpt = Checkpointer(store, {"weights": {"w": torch.ones(1_000)}})
    handle = ckpt.save(1)
    store.reached.wait()

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_name == "finish":
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            ckpt.close()
    finally:
        sys.setprofile(None)
    assert not handle.done()
    store.let_go.set()
    assert handle.wait()


# Each of these calls is interrupted at one function after the other, and then others do what comes
# next.
EVERYWHERE = """
import itertools, sys, tempfile
import torch
import dist_ckpt
from tests.interrupted import is_interrupted

def state():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    return {"model": model, "optimizer": optimizer, "loop": {"step": 3}}

what, first, stride = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in itertools.count(first, stride):
    with tempfile.TemporaryDirectory() as place:
        live = state()
        dist_ckpt.save(live, place, step=1)
        ckpt = dist_ckpt.Checkpointer(place, live, every_steps=1)
        match what:
            case "save":
                work = lambda: dist_ckpt.save(live, place, step=2)
            case "async_save":
                work = lambda: dist_ckpt.async_save(live, place, step=2).wait()
            case "Checkpointer":
                ckpt.restore()
                work = lambda: ckpt.save(2)
        more = is_interrupted(number, work)
        if what == "Checkpointer":
            ckpt.save(5)
            ckpt.close()
        dist_ckpt.save(live, place, step=9)
        steps = dist_ckpt.Run(place).steps()
        assert {1, 9} <= set(steps) <= {1, 2, 5, 9}, steps
        for step in steps:
            dist_ckpt.load(state(), place, step=step)
    if not more:
        print("fine", number)
        break
"""


@pytest.mark.soak
@pytest.mark.parametrize("what", ["save", "async_save", "Checkpointer"])
def test_an_interrupt_at_any_function_of_a_save_leaves_nothing_to_wait_for(what: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, what, "1", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ran.stdout.startswith("fine"), ran.stderr[-4000:]
