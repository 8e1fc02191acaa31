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

# A wait is interrupted where each of its functions begins, one after the other, and then by a
# SIGINT at a random moment of each round, after which it is looked at what is left. A signal that
# comes late is nothing: the next round has another.
PROGRAM = r'''
import os, signal, subprocess, sys, threading
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.s3_client import OnLoop
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.parallel import in_parallel, in_two_steps
from dist_ckpt.waiting import Latch, Worker
from tests.interrupted import is_interrupted

SENDER = """
import os, random, sys, time
for line in sys.stdin:
    until = time.perf_counter() + random.random() * float(line)
    while time.perf_counter() < until:
        pass
    os.kill(int(sys.argv[1]), 2)
"""
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
way, rounds, at_most = sys.argv[1], int(sys.argv[2]), b"0.001\n"
at_work = set()

def work(item):
    me = object()
    try:
        at_work.add(me)
        # Others take longer: the thread that is interrupted is the first that has nothing to do.
        is_main = threading.current_thread() is threading.main_thread()
        Latch().wait(0.00005 if is_main else 0.005)
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

store = LimitStore(MemoryStore("interrupted"), max_concurrent=1)
store.put("key", [b"value"])
once = [Latch()]
workers = []

def wait_for_worker():
    worker = Worker(lambda: work(None), name="worker", daemon=True)
    workers.append(worker)
    worker.start()
    worker.wait()

def is_whole_after_latch():
    latch, once[0] = once[0], Latch()
    threading.Thread(target=latch.open, daemon=True).start()
    assert latch.wait(60)

def is_whole_after_limit():
    other = threading.Thread(target=store.size, args=["key"], daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()

def is_whole_after_loop():
    assert OnLoop(answer).result() == "fine"

def is_whole_after_worker():
    while workers:
        workers.pop().wait()

def nothing_is_left():
    pass

# What waits, and what must hold after it was interrupted.
WAYS = {
    "latch": (lambda: once[0].wait(0.00002), is_whole_after_latch),
    "threads": (lambda: in_parallel(work, range(8), threads=3), nothing_is_left),
    "two steps": (
        lambda: in_two_steps(work, work, range(8), firsts=2, seconds=2, under_way=3),
        nothing_is_left,
    ),
    "loop": (lambda: OnLoop(answer).result(), is_whole_after_loop),
    "worker": (wait_for_worker, is_whole_after_worker),
    "limit": (lambda: store.size("key"), is_whole_after_limit),
}
wait, look = WAYS[way]

def check():
    look()
    assert not at_work, "nobody works on what the caller may close now"

number = 1
while is_interrupted(number, wait):
    check()
    number += 1
for _ in range(rounds):
    until_interrupted(wait)
    check()
sender.kill()
print("fine")
'''


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
