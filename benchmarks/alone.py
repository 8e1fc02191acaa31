"""One way to save, alone in a process of its own: its first save, and the memory that it takes."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.measure import no_warnings, say
from benchmarks.memory import Peak
from benchmarks.peers import empty, make
from benchmarks.workload import Loop, State

EARLY_SAVES = 3
_TRAINED_SECONDS = 10.0
_TIMED_RUNS = 5


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
    """Measure the peer `name` in new processes, which see nothing of what was measured before."""
    timed = [_run(name, place, scale, EARLY_SAVES + 1, "time") for _ in range(_TIMED_RUNS)]
    watched = _run(name, place, scale, saves, "memory")
    return replace(
        watched,
        first_seconds=median(each.first_seconds for each in timed),
        warm_seconds=median(each.warm_seconds for each in timed),
    )


def _run(name: str, place: Path, scale: float, saves: int, what: str) -> Alone:
    arguments = [name, str(place), str(scale), str(saves), what]
    command = [sys.executable, "-m", "benchmarks.alone", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def measure_alone(name: str, place: Path, *, scale: float, saves: int, watched: bool) -> Alone:
    """Measure the peer `name` here.

    Args:
        name: which peer.
        place: an empty folder to save to.
        scale: of the state.
        saves: how many, more than one.
        watched: whether to look at the memory, which holds up the page faults and copies that are
            timed otherwise.
    """
    state, loop = State(scale), Loop(scale)
    loop.steps(2)
    stalls: list[float] = []
    early = 0
    with Peak() if watched else nullcontext() as peak:
        peer = make(name, place, state)
        # A program trains what it saves; what a library prepares meanwhile is its good right.
        until = time.monotonic() + max(0.2, _TRAINED_SECONDS * scale)
        while time.monotonic() < until:
            loop.steps(1)
            state.touch()
        gc.collect()  # else whoever comes first may pay for the garbage of all imports
        for number in range(saves):
            begun = time.perf_counter()
            wait = peer.start(number)
            stalls.append(time.perf_counter() - begun)
            wait()
            empty(place)
            if number < EARLY_SAVES and peak is not None:
                early = peak.nbytes
        peer.close()
    late = 0 if peak is None else peak.nbytes
    return Alone(state.nbytes, stalls[0], median(stalls[1:]), early, late)


def main(arguments: list[str]) -> int:
    """Measure what `arguments` name and print it as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("place", type=Path)
    parser.add_argument("scale", type=float)
    parser.add_argument("saves", type=int)
    parser.add_argument("what", choices=("time", "memory"))
    chosen = parser.parse_args(arguments)
    with no_warnings():
        found = measure_alone(
            chosen.name,
            chosen.place,
            scale=chosen.scale,
            saves=chosen.saves,
            watched=chosen.what == "memory",
        )
    say(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
