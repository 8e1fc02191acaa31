"""torchrun starts the workers again after one has died, with its own store and with a new one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from examples.demo_parts.launch import ENVIRONMENT, ROOT, Phase
from examples.demo_parts.records import read_losses, standing

TIMEOUT_SECONDS = 600
WARNING = "torchrun will hand restarted workers the store of those before them"
VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@pytest.mark.soak
@pytest.mark.parametrize("new_store", ["0", "1"])
def test_workers_that_were_started_again_go_on(new_store: str, tmp_path: Path) -> None:
    # In the old store gloo finds the addresses of the dead, and may wait for them for half an hour
    # before anything of ours is called: there it is said that this will happen, and no more.
    kill_at = 4 if new_store == "1" else None
    phase = Phase("killed", tmp_path, "fsdp", 2, 8, kill_at=kill_at)
    command = phase.command(["--checkpoint-interval", "2", "--device", "cpu"])
    command[command.index("--max-restarts") + 1] = "20"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, VARIABLE: new_store},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (WARNING in done.stderr) == (new_store == "0")
    assert VARIABLE in done.stderr or new_store == "1"
    attempts = read_losses(phase.losses)
    assert [one.resumed for one in attempts] == ([0] if kill_at is None else [0, 2])
    assert [entry.step for entry in standing(attempts)] == list(range(1, 9))
    repository = Repository(resolve(phase.run))
    assert all(repository.verify(step).ok for step in repository.steps())
