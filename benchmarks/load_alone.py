"""One way to load, alone in a process of its own: the memory that it takes above the target."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.loads import make
from benchmarks.measure import no_warnings, say
from benchmarks.memory import Peak
from benchmarks.workload import State


def run_alone(name: str, place: Path, *, scale: float) -> int:
    """Return what `measure_alone` finds in a new process, which allocated nothing before."""
    command = [sys.executable, "-m", "benchmarks.load_alone", name, str(place), str(scale)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def measure_alone(name: str, place: Path, *, scale: float) -> int:
    """Load once; return the most memory, in bytes, above that of the state which is loaded into.

    Args:
        name: which way.
        place: what it saved.
        scale: of the state that was saved.
    """
    state = State(scale)  # all of its memory was touched: a load only writes to it again
    with no_warnings(), Peak() as peak:
        make(name, place, state).load()
    return peak.nbytes


def main(arguments: list[str]) -> int:
    """Measure what `arguments` name and print it as a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("place", type=Path)
    parser.add_argument("scale", type=float)
    chosen = parser.parse_args(arguments)
    say(str(measure_alone(chosen.name, chosen.place, scale=chosen.scale)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
