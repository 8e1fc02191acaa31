"""The checkpoints of other trainers beside ours, in one run: `python -m benchmarks.trainers`.

A framework is a module with a section of its own (`benchmarks/trainers_<name>.py`), entered here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.sections import run_sections
from benchmarks.trainers_transformers import transformers


def main(arguments: list[str]) -> int:
    """Measure what `arguments` choose; return 0 when all targets are met."""
    sections: dict[str, Callable[[Path, argparse.Namespace], bool]] = {
        "transformers": transformers,
    }
    met = run_sections(arguments, sections, description=__doc__, libraries=[])
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
