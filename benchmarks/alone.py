"""One way to save, alone in a process of its own: its first save, and the memory that it takes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import no_warnings, say
from benchmarks.memory import Peak
from benchmarks.peers import empty, make
from benchmarks.workload import Loop, State

EARLY_SAVES = 3


@dataclass(frozen=True, slots=True)
class Alone:
    """What one process measured of itself.

    Attributes:
        state_bytes: of the tensors that it saved.
        first_seconds: how long its first save stalled.
        warm_seconds: median of the later ones.
        early_bytes: most memory above that of the state until the end of save `EARLY_SAVES`.
        late_bytes: the same until the end of the last save.
    """

    state_bytes: int
    first_seconds: float
    warm_seconds: float
    early_bytes: int
    late_bytes: int


def run_alone(name: str, place: Path, *, scale: float, saves: int) -> Alone:
    """Measure the peer `name` in a new process, which sees nothing of what was measured before."""
    command = [sys.executable, "-m", "benchmarks.alone", name, str(place), str(scale), str(saves)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def measure_alone(name: str, place: Path, *, scale: float, saves: int) -> Alone:
    """Measure the peer `name` here.

    Args:
        name: which peer.
        place: an empty folder to save to.
        scale: of the state.
        saves: how many, more than one.
    """
    state, loop = State(scale), Loop(scale)
    loop.steps(2)
    stalls: list[float] = []
    early = 0
    with Peak() as peak:
        peer = make(name, place, state)
        # A program trains before it saves; what a library prepares meanwhile is its good right.
        until = time.monotonic() + max(0.2, 3 * scale)
        while time.monotonic() < until:
            loop.steps(1)
        for number in range(saves):
            begun = time.perf_counter()
            wait = peer.start(number)
            stalls.append(time.perf_counter() - begun)
            wait()
            empty(place)
            if number < EARLY_SAVES:
                early = peak.nbytes
        peer.close()
    return Alone(state.nbytes, stalls[0], median(stalls[1:]), early, peak.nbytes)


def main(arguments: list[str]) -> int:
    """Measure what `arguments` name and print it as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("place", type=Path)
    parser.add_argument("scale", type=float)
    parser.add_argument("saves", type=int)
    chosen = parser.parse_args(arguments)
    with no_warnings():
        found = measure_alone(chosen.name, chosen.place, scale=chosen.scale, saves=chosen.saves)
    say(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
