"""The command line of a benchmark that measures libraries side by side, section by section."""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.libraries import available
from benchmarks.measure import no_warnings, say

ResultT = TypeVar("ResultT")


def run_sections(
    arguments: list[str],
    sections: Mapping[str, Callable[[Path, argparse.Namespace], ResultT]],
    *,
    description: str | None,
    libraries: Sequence[str],
) -> list[ResultT]:
    """Run the sections that `arguments` choose, each in an empty folder; return their results.

    Args:
        arguments: the command line.
        sections: by name, what measures; given its folder and the parsed command line.
        description: of the benchmark, for `--help`.
        libraries: what is to be measured; those that are missing are named.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("what", nargs="*", default=list(sections), help=", ".join(sections))
    parser.add_argument("--place", type=Path, default=Path("build"), help="a folder of the disk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is a GPT-2-small")
    chosen = parser.parse_args(arguments)
    if not set(chosen.what) <= sections.keys() or chosen.repeats < 1 or not 0 < chosen.scale <= 1:
        parser.error(f"choose from {', '.join(sections)}; --scale is above 0 and at most 1")
    say(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Linux {platform.release()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    chosen.place.mkdir(parents=True, exist_ok=True)
    results: list[ResultT] = []
    with no_warnings():  # of the threads of the peers too
        for name, reason in available(libraries)[1].items():
            say(f"NOT MEASURED: {name} cannot be imported ({reason})")
        for name in chosen.what:
            place = Path(tempfile.mkdtemp(prefix="bench-", dir=chosen.place))
            try:
                results.append(sections[name](place, chosen))
            finally:
                shutil.rmtree(place, ignore_errors=True)
    return results
