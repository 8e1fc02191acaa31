"""Runs the phases of the demo under torchrun: quietly, and never without a deadline."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo_parts.records import RecordError, read_losses

ROOT = Path(__file__).resolve().parents[2]
LAYOUT_NAMES = {"ddp": "DDP", "fsdp": "FSDP2"}
DEADLINE_SECONDS = 900.0
# Asked to end, torchrun gives its workers 30 s before it kills them itself.
GRACE_SECONDS = 40.0
_POLL_SECONDS = 0.1
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # All workers are on this machine: no other interface is needed, nor a host name.
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    # c10d asks the resolver for the name of every peer, for its log: without a name server in
    # reach each question would cost 5 s.
    "RES_OPTIONS": "timeout:1 attempts:1",
}
# Otherwise torchrun gives restarted workers the store of those before them, where they find the
# addresses of dead processes (pytorch issue 135712; torch 2.13 still does). Only where workers are
# restarted: torchrun looks for a free port then, which may be taken when rank 0 listens there.
RESTARTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_TAIL_LINES = 40


class PhaseFailed(Exception):
    """A phase did not end well; the message has the end of its output."""


@dataclass(frozen=True)
class Phase:
    """One torchrun of the training program.

    Attributes:
        name: what it is for.
        folder: where its run directory, logs, diaries and output go.
        layout: `ddp` or `fsdp`.
        world_size: number of workers.
        steps: where to stop.
        kill_at: kill a worker while this step is being saved, and let torchrun restart it.
        store: URL below which the run directory goes instead of `folder`.
    """

    name: str
    folder: Path
    layout: str
    world_size: int
    steps: int
    kill_at: int | None = None
    store: str = ""

    @property
    def workers(self) -> str:
        """Layout and number of workers, for people."""
        return f"{LAYOUT_NAMES[self.layout]} x {self.world_size}"

    @property
    def title(self) -> str:
        """Name and workers, for people."""
        return f"{self.name}, {self.workers}"

    @property
    def run(self) -> str:
        """The run directory, where the checkpoints are: a path or a URL."""
        return f"{self.store}/{self.folder.name}" if self.store else str(self.folder / "run")

    @property
    def losses(self) -> Path:
        """The log of losses."""
        return self.folder / "losses.jsonl"

    @property
    def sample_logs(self) -> list[Path]:
        """The sample ids, one file per rank."""
        return [self.folder / f"losses.rank{rank}.jsonl" for rank in range(self.world_size)]

    @property
    def diaries(self) -> list[Path]:
        """The diaries, one per rank."""
        return [self.folder / "diary" / f"rank{rank}.jsonl" for rank in range(self.world_size)]

    @property
    def output(self) -> Path:
        """What torchrun and the workers printed."""
        return self.folder / "output.txt"

    @property
    def environment(self) -> dict[str, str]:
        """What it needs beside `ENVIRONMENT`."""
        return {} if self.kill_at is None else RESTARTING

    def command(self, training: Sequence[str]) -> list[str]:
        """Return the command line; `training` are options of `train_gpt.py` for all phases."""
        restarts = 0 if self.kill_at is None else 1
        kill = [] if self.kill_at is None else ["--kill-at", str(self.kill_at)]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", str(self.world_size)),
            *("--max-restarts", str(restarts), "-m", "examples.demo_parts.worker"),
            *("--diary", str(self.folder / "diary"), *kill, "--"),
            *("--checkpoint-dir", self.run, "--auto-resume", "--losses", str(self.losses)),
            *("--parallel", self.layout),
            *("--steps", str(self.steps), *training),
        ]


class RunningPhase:
    """A phase that was started, and its bar."""

    def __init__(self, phase: Phase, training: Sequence[str], bars: Progress) -> None:
        self.phase, self.bars = phase, bars
        self.deadline = time.monotonic() + DEADLINE_SECONDS
        phase.folder.mkdir(parents=True, exist_ok=True)
        with phase.output.open("wb") as output:
            self.process = subprocess.Popen(
                phase.command(training),
                cwd=ROOT,
                env={**ENVIRONMENT, **phase.environment, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.task = bars.add_task(phase.title, total=phase.steps, loss=math.nan)

    def poll(self) -> bool:
        """Move the bar; return whether the phase has ended.

        Raises:
            PhaseFailed: it failed, or its deadline has passed.
        """
        status = self.process.poll()
        self._move_bar()
        if status is None and time.monotonic() > self.deadline:
            raise PhaseFailed(self._failure(f"did not end within {DEADLINE_SECONDS:.0f} s"))
        if status:
            raise PhaseFailed(self._failure(f"ended with exit code {status}"))
        return status is not None

    def stop(self) -> None:
        """End torchrun, and through it the workers, if they still run."""
        if self.process.poll() is None:
            # torchrun passes the signal on: its workers are in sessions of their own.
            self.process.terminate()
            try:
                self.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _move_bar(self) -> None:
        try:
            attempts = read_losses(self.phase.losses)
        except RecordError:  # nothing logged yet, or a line is being written
            return
        if attempts and attempts[-1].entries:
            last = attempts[-1].entries[-1]
            loss = float.fromhex(last.value)
            self.bars.update(self.task, completed=last.step, loss=loss)

    def _failure(self, what: str) -> str:
        lines = self.phase.output.read_text(errors="replace").splitlines()
        # The workers' own words come before torchrun's summary of them.
        ends = [number for number, line in enumerate(lines) if "] failed (exitcode" in line]
        tail = lines[: ends[-1] + 1] if ends else lines
        text = "\n".join(f"    {line}" for line in tail[-_TAIL_LINES:])
        return f"{self.phase.title} {what}; the end of its output ({self.phase.output}):\n{text}"


def run_phases(phases: Sequence[Phase], training: Sequence[str], console: Console) -> None:
    """Run `phases` side by side to their ends.

    Args:
        phases: what to run.
        training: options of `train_gpt.py` that all of them share.
        console: where the bars go; a console that is no terminal gets one line per phase.

    Raises:
        PhaseFailed: one failed; the others were stopped.
    """
    loss = TextColumn("loss {task.fields[loss]:.4f}")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn())
    running: list[RunningPhase] = []
    with Progress(*columns, console=console) as bars:
        try:
            running.extend(RunningPhase(phase, training, bars) for phase in phases)
            waiting = list(running)
            while waiting:
                waiting = [one for one in waiting if not one.poll()]
                time.sleep(_POLL_SECONDS)
        finally:
            for one in running:
                one.stop()
