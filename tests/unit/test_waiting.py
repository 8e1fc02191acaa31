"""Interrupts at any moment of a wait leave nothing locked, nobody at work, and no other error."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from dist_ckpt.waiting import Bell, Latch

ROOT = Path(__file__).resolve().parents[2]

# Each round begins an interruptible wait, is sent a SIGINT at a random moment, and then looks at
# what is left. A signal that comes late is nothing: the next round has another.
PROGRAM = """
import os, signal, subprocess, sys, threading
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.s3_client import OnLoop
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.parallel import in_parallel, in_two_steps
from dist_ckpt.waiting import Latch, Worker

SENDER = '''
import os, random, sys, time
for line in sys.stdin:
    until = time.perf_counter() + random.random() * float(line)
    while time.perf_counter() < until:
        pass
    os.kill(int(sys.argv[1]), 2)
'''
armed = False

def handle(number, frame):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handle)
sender = subprocess.Popen(
    [sys.executable, "-c", SENDER, str(os.getpid())], stdin=subprocess.PIPE, bufsize=0
)
way, rounds, at_most = sys.argv[1], int(sys.argv[2]), b"0.001\\n"
at_work = set()

def work(item):
    me = object()
    try:
        at_work.add(me)
        Latch().wait(0.00005)
        return item
    finally:
        at_work.discard(me)

async def answer():
    return "fine"

def until_interrupted(wait):
    global armed
    try:
        armed = True
        sender.stdin.write(at_most)
        while armed:  # Python itself loses an interrupt in the finalizer of an object
            wait()
    except KeyboardInterrupt:
        return
    finally:
        armed = False

latch = Latch()
store = LimitStore(MemoryStore("interrupted"), max_concurrent=1)
store.put("key", [b"value"])
for _ in range(rounds):
    if way == "latch":
        until_interrupted(lambda: latch.wait(0.00002))
        other = threading.Thread(target=latch.open, daemon=True)
        other.start()
        assert latch.wait(60)
        latch = Latch()
    elif way == "threads":
        until_interrupted(lambda: in_parallel(work, range(8), threads=3))
    elif way == "two steps":
        until_interrupted(
            lambda: in_two_steps(work, work, range(8), firsts=2, seconds=2, under_way=3)
        )
    elif way == "loop":
        until_interrupted(lambda: OnLoop(answer).result())
        assert OnLoop(answer).result() == "fine"
    elif way == "worker":
        def begin_and_wait():
            worker = Worker(lambda: work(None), name="worker", daemon=True)
            workers.append(worker)
            worker.start()
            worker.wait()

        workers = []
        until_interrupted(begin_and_wait)
        for worker in workers:
            worker.wait()
    elif way == "limit":
        until_interrupted(lambda: store.size("key"))
        other = threading.Thread(target=store.size, args=["key"], daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()
    assert not at_work, "nobody works on what the caller may close now"
sender.kill()
print("fine")
"""


@pytest.mark.parametrize("way", ["latch", "threads", "two steps", "loop", "worker", "limit"])
def test_an_interrupt_at_any_moment_breaks_nothing(way: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, way, "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "fine\n", ran.stderr


def test_a_latch_lets_all_go_at_once_and_for_ever() -> None:
    latch = Latch()
    assert not latch.wait(0)
    assert not latch.is_open
    threads = [threading.Thread(target=latch.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    latch.open()
    for thread in threads:
        thread.join()
    assert latch.wait()
    assert latch.is_open


def test_who_waits_for_a_bell_misses_no_change() -> None:
    bell = Bell()
    done: list[int] = []

    def has_come(least: int) -> bool:
        return len(done) >= least

    def change() -> None:
        for number in range(1000):
            done.append(number)
            bell.ring()

    other = threading.Thread(target=change)
    other.start()
    for least in range(1, 1001):
        assert bell.wait_for(partial(has_come, least))
    other.join()


def test_a_wait_that_is_too_long_for_the_system_is_as_long_as_may_be() -> None:
    bell = Bell()
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(bell.wait_for(found.copy, 1e30)[0]))
    other.start()
    found.append("here")
    bell.ring()
    other.join()
    assert found == ["here", "here"]
