"""The checkpoints of other trainers beside ours, in one run: `python -m benchmarks.trainers`.

A framework is a module with a section of its own (`benchmarks/trainers_<name>.py`), named here. It
is measured where the framework is installed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.measure import say
from benchmarks.sections import run_sections

FRAMEWORKS = ("transformers", "accelerate", "lightning", "torchtitan", "ray")


def main(arguments: list[str]) -> int:
    """Measure what `arguments` choose; return 0 when all targets are met."""
    sections = {name: partial(_measure, name) for name in FRAMEWORKS}
    met = run_sections(arguments, sections, description=__doc__, libraries=[])
    return 0 if all(met) else 1


def _measure(name: str, place: Path, chosen: argparse.Namespace) -> bool:
    try:
        section = import_module(f"benchmarks.trainers_{name}")
    except ImportError as error:
        say(f"\nNOT MEASURED: {name} cannot be imported ({error})")
        return True
    met: bool = section.measure(place, chosen)
    return met


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
