"""A training on two hosts under torchrun, of which one is lost and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.demo_parts.launch import (
    DEADLINE_SECONDS,
    ENVIRONMENT,
    GRACE_SECONDS,
    RESTARTING,
    ROOT,
    PhaseFailed,
)
from examples.demo_parts.records import Attempt, Entry, RecordError, read_losses, read_samples
from tests.services.hosts import Host, Hosts

WORKERS = 2  # on each host
HOSTS = 2
# Of the second host: ranks follow the addresses.
VICTIM_RANK = WORKERS
_PORT = 29400
_POLL_SECONDS = 0.1
# torchrun takes a host for lost after three seconds without a word, and waits two for one more.
_RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
_TAIL_LINES = 30


@dataclass
class TwoHosts:
    """One training, and a torchrun for each host that is there.

    Attributes:
        hosts: where it runs.
        folder: where its logs, diaries and output go.
        run: the run directory, a path or a URL.
        training: options of `train_gpt.py`.
        kill_at: the step in whose save the second host is lost.
    """

    hosts: Hosts
    folder: Path
    run: str
    training: Sequence[str]
    kill_at: int
    agents: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def losses(self) -> Path:
        """The log of losses."""
        return self.folder / "losses.jsonl"

    @property
    def diaries(self) -> list[Path]:
        """The diaries, one per rank."""
        ranks = range(WORKERS * HOSTS)
        return [self.folder / "diary" / f"rank{rank}.jsonl" for rank in ranks]

    def start(self, number: int, *, doomed: bool = False) -> None:
        """Start torchrun on a host.

        Args:
            number: of the host.
            doomed: whether it is to be lost.
        """
        host = self.hosts[number]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._output(number).open("ab") as output:
            self.agents[number] = subprocess.Popen(
                host.command(self.command(host, doomed=doomed)),
                cwd=ROOT,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    **RESTARTING,
                    "GLOO_SOCKET_IFNAME": host.interface,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def attempts(self) -> list[Attempt[str]]:
        """Return the losses so far; none while a line is being written."""
        try:
            return read_losses(self.losses)
        except RecordError:
            return []

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds.

        Raises:
            PhaseFailed: it does not in time, or the first host's torchrun has failed.
        """
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise PhaseFailed(self._failure(f"{what}: not within {DEADLINE_SECONDS:.0f} s"))
            if self.agents[0].poll():
                raise PhaseFailed(self._failure(f"{what}: torchrun of the first host failed"))
            time.sleep(_POLL_SECONDS)

    def has_ended(self) -> bool:
        """Whether every torchrun has."""
        return all(agent.poll() is not None for agent in self.agents.values())

    def stop(self) -> None:
        """End what still runs."""
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.terminate()
                try:
                    agent.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    agent.kill()
                    agent.wait()

    def _output(self, number: int) -> Path:
        return self.folder / f"output-{number}.txt"

    def command(self, host: Host, *, doomed: bool) -> list[str]:
        """Return the command line of a host."""
        kill = ("--kill-at", str(self.kill_at), "--victim", str(VICTIM_RANK), "--whole-host")
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", f"1:{HOSTS}"),
            *("--nproc-per-node", str(WORKERS), "--local-addr", host.address),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.hosts[0].address}:{_PORT}"),
            *("--rdzv-conf", f"is_host={int(host.number == 0)},{_RENDEZVOUS}"),
            *("--max-restarts", "3", "-m", "examples.demo_parts.worker"),
            *("--diary", str(self.folder / "diary"), *(kill if doomed else ()), "--"),
            *("--checkpoint-dir", self.run, "--auto-resume", "--losses", str(self.losses)),
            *("--parallel", "fsdp", *self.training),
        ]

    def _failure(self, what: str) -> str:
        parts = [what]
        for number in self.agents:
            lines = self._output(number).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            parts += [f"the end of {self._output(number)}:", *(f"    {line}" for line in lines)]
        return "\n".join(parts)


def samples_of_all(
    losses: Path, attempts: Sequence[Attempt[str]]
) -> list[Attempt[tuple[int, ...]]]:
    """Return what all ranks together saw in each start, however many ranks that had.

    A step that not every rank has logged was cut short, and is no part of it.

    Raises:
        RecordError: a rank has no record of a start that it was in.
    """
    ranks = range(max(attempt.world_size for attempt in attempts))
    logs = [read_samples(losses.with_suffix(f".rank{rank}{losses.suffix}")) for rank in ranks]
    found = []
    for attempt in attempts:
        parts = [_taken(log, attempt) for log in logs[: attempt.world_size]]
        steps = [{entry.step: entry for entry in part.entries} for part in parts]
        whole = [
            Entry(step, sum((each[step].value for each in steps), ()), entry.time)
            for step, entry in steps[0].items()
            if all(step in each for each in steps)
        ]
        setup = (attempt.resumed, attempt.layout, attempt.world_size, attempt.time)
        found.append(Attempt(*setup, entries=whole))
    return found


def _taken(log: list[Attempt[tuple[int, ...]]], start: Attempt[str]) -> Attempt[tuple[int, ...]]:
    for number, one in enumerate(log):
        if (one.resumed, one.world_size) == (start.resumed, start.world_size):
            return log.pop(number)
    raise RecordError(f"a rank has no record of the start from step {start.resumed}")
