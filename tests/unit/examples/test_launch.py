"""A phase that fails or hangs ends the demo with the tail of its output."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from examples.demo_parts import launch
from examples.demo_parts.launch import Phase, PhaseFailed, run_phases


@dataclass(frozen=True)
class Script(Phase):
    """A phase that is a line of Python instead of a torchrun."""

    code: str = ""

    def command(self, training: Sequence[str]) -> list[str]:
        """Return the command line."""
        return [sys.executable, "-c", self.code, *training]


def script(folder: Path, code: str) -> Script:
    return Script("the phase", folder, "ddp", 2, 3, code=code)


def run(*phases: Phase) -> str:
    console = Console(file=io.StringIO(), width=100)
    run_phases(phases, ["--seed", "7"], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_command_line(tmp_path: Path) -> None:
    phase = Phase("killed", tmp_path, "fsdp", 2, 60, kill_at=40)
    command = phase.command(["--seed", "7"])
    text = " ".join(command)
    assert "--nproc-per-node 2 --max-restarts 1" in text
    assert "--kill-at 40 -- " in text
    assert f"--checkpoint-dir {tmp_path}/run --auto-resume" in text
    assert text.endswith("--parallel fsdp --steps 60 --seed 7")


def test_a_run_in_a_store_and_its_logs_in_the_folder(tmp_path: Path) -> None:
    phase = Phase("killed", tmp_path / "killed", "fsdp", 2, 60, store="s3://bucket/demo")
    text = " ".join(phase.command([]))
    assert "--checkpoint-dir s3://bucket/demo/killed " in text
    assert f"--losses {tmp_path}/killed/losses.jsonl" in text


def test_a_phase_that_is_not_killed_is_not_restarted(tmp_path: Path) -> None:
    text = " ".join(Phase("x", tmp_path, "ddp", 4, 60).command([]))
    assert "--max-restarts 0" in text
    assert "--kill-at" not in text


def test_phases_run_to_their_ends_and_get_the_common_options(tmp_path: Path) -> None:
    phase = script(tmp_path / "new", "import sys; print(sys.argv[1:])")
    assert "the phase" in run(phase)
    assert phase.output.read_text() == "['--seed', '7']\n"


def test_the_bar_follows_the_log(tmp_path: Path) -> None:
    phase = script(tmp_path, "")
    lines = [
        {"resumed": 0, "layout": "ddp", "world_size": 2, "time": 0},
        {"step": 1, "loss": (2.5).hex(), "rate": 1, "time": 0},
    ]
    phase.losses.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run(phase)
    assert "1/3" in shown
    assert "loss 2.5000" in shown


def test_a_failure_shows_the_end_of_the_output(tmp_path: Path) -> None:
    code = "print(*range(1000), sep='\\n'); raise SystemExit(3)"
    with pytest.raises(PhaseFailed, match="exit code 3") as caught:
        run(script(tmp_path, code))
    assert "999" in str(caught.value)
    assert "900" not in str(caught.value)


def test_a_hang_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DEADLINE_SECONDS", 0.0)
    with pytest.raises(PhaseFailed, match="did not end within 0 s"):
        run(script(tmp_path, "import threading; threading.Event().wait()"))


def test_a_process_that_ignores_the_request_to_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.0)
    code = (
        "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); threading.Event().wait()"
    )
    phase = script(tmp_path, code)
    monkeypatch.setattr(launch.RunningPhase, "poll", _fail_when_deaf)
    with pytest.raises(PhaseFailed):
        run(phase)


def _fail_when_deaf(running: launch.RunningPhase) -> bool:
    if "deaf" in running.phase.output.read_text():
        raise PhaseFailed("enough")
    return False


def test_the_others_are_ended_when_one_fails(tmp_path: Path) -> None:
    endless = script(tmp_path / "endless", "import threading; threading.Event().wait()")
    failing = script(tmp_path / "failing", "raise SystemExit(1)")
    with pytest.raises(PhaseFailed, match="exit code 1"):
        run(endless, failing)
