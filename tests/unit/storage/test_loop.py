"""The event loop of a process: at its end, after a fork, and with work that fails."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ckpt.storage.s3_client import process_loop

PREAMBLE = """
import asyncio, atexit, os
from dist_ckpt.storage.s3_client import process_loop

async def add(*numbers):
    return await asyncio.to_thread(sum, numbers)

def ask():
    return asyncio.run_coroutine_threadsafe(add(2, 3), process_loop()).result(60)
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + script],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_works_until_the_process_is_gone() -> None:
    """Pools of threads take no work at exit; a last save that is finished there needs some."""
    assert run("ask(); atexit.register(lambda: print(ask()))") == "5\n"
    assert run("process_loop(); atexit.register(lambda: print(ask()))") == "5\n"


def test_child_has_a_loop_of_its_own() -> None:
    script = """
mine = process_loop()
if os.fork() == 0:
    assert process_loop() is not mine
    os._exit(0 if ask() == 5 else 1)
print(os.wait()[1], ask())
"""
    assert run(script) == "0 5\n"


def test_one_for_all_threads_of_a_process() -> None:
    assert process_loop() is process_loop()


def test_connections_are_closed_after_the_last_save() -> None:
    """Whatever is finished at exit still has its connections, though it was registered earlier."""
    script = """
from dist_ckpt.storage import S3Store, s3


clients = []

class Noted(s3.Client):
    def __init__(self, options):
        super().__init__(options)
        clients.append(self)

s3.Client = Noted
store = S3Store("bucket", storage_options={"anon": True})
(client,) = clients

async def connected():
    await client.session().connected(None, "head_object")
    return len(client.session().clients)

atexit.register(lambda: print(client.run(connected)))
client.run(connected)
"""
    assert run(script) == "1\n"


def test_errors_of_helpers_arrive() -> None:
    def fail() -> None:
        raise ArithmeticError("in a helper")

    async def ask() -> None:
        await asyncio.to_thread(fail)

    with pytest.raises(ArithmeticError, match="in a helper"):
        asyncio.run_coroutine_threadsafe(ask(), process_loop()).result(60)
