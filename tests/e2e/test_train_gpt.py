"""The training example, started as a person would start it, again and again on one directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from examples.demo_parts.records import Attempt, Entry, read_losses, read_samples, standing

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
TIMEOUT_SECONDS = 600


def train(folder: Path, steps: int, *launcher: str, layout: str = "ddp") -> None:
    command = [sys.executable, *launcher, "examples/train_gpt.py"]
    command += ["--checkpoint-dir", str(folder / "run"), "--auto-resume"]
    command += ["--parallel", layout, "--device", "cpu", "--steps", str(steps)]
    command += ["--checkpoint_interval", "2", "--losses", str(folder / "losses.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak  # what the demo proves, as well
def test_a_run_goes_on_with_other_workers_and_layouts(tmp_path: Path) -> None:
    train(tmp_path, 3)
    train(tmp_path, 5, *TORCHRUN, "--nproc-per-node", "2", layout="fsdp")
    train(tmp_path, 6)

    losses = read_losses(tmp_path / "losses.jsonl")
    assert [(one.resumed, one.world_size) for one in losses] == [(0, 1), (3, 2), (5, 1)]
    assert [entry.step for entry in standing(losses)] == [1, 2, 3, 4, 5, 6]
    assert _samples_seen(tmp_path) == 6 * 12

    repository = Repository(resolve(str(tmp_path / "run")))
    # The three newest are kept, and the last step of each start was saved though it was not due.
    assert repository.steps() == [4, 5, 6]
    assert [repository.verify(step).problems for step in repository.steps()] == [()] * 3


def test_asked_to_end_it_saves_first(tmp_path: Path) -> None:
    log = tmp_path / "losses.jsonl"
    os.mkfifo(log)  # reading it waits for the next step
    command = [sys.executable, "examples/train_gpt.py", "--checkpoint-dir", str(tmp_path / "run")]
    command += ["--checkpoint-interval", "1000", "--device", "cpu", "--losses", str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        with log.open() as lines:
            steps = [json.loads(next(lines)).get("step", 0) for _ in range(4)]
            process.terminate()
            steps += [json.loads(line)["step"] for line in lines]
        assert process.wait(TIMEOUT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    # Nothing was due but by the signal, and no step that was taken is lost.
    assert 3 <= steps[-1] < 72
    assert Repository(resolve(str(tmp_path / "run"))).steps() == [steps[-1]]


def _samples_seen(folder: Path) -> int:
    """Return how many different samples were seen, checking that none was seen twice."""
    attempts: list[Attempt[tuple[int, ...]]] = []
    for rank in (0, 1):
        attempts += read_samples(folder / f"losses.rank{rank}.jsonl")
    entries: list[Entry[tuple[int, ...]]] = [e for one in attempts for e in one.entries]
    seen = [sample for entry in entries for sample in entry.value]
    assert len(set(seen)) == len(seen)
    return len(seen)
