"""Run tests and say how much of the package they reach: the total, and each module below the mark.

Lines and branches are counted, in the processes that tests start and fork as well; what a process
reached that was killed is lost. The counting slows what is counted, so that this is no test run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK_PERCENT = 85.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pytest with `arguments` (otherwise all tests), print the report; return its status."""
    folder = ROOT / "build" / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = folder / "report.json"
    tests = list(sys.argv[1:] if arguments is None else arguments) or ["tests"]
    status = _coverage(folder, "run", "-m", "pytest", "-q", *tests)
    for command in (["combine", "-q"], ["json", "-q", "-o", str(report)]):
        if failed := _coverage(folder, *command):
            return failed
    print("\n" + told(json.loads(report.read_text())))
    return status


def told(report: Mapping[str, Any]) -> str:
    """Return the total, and what is below the mark, the lowest first, as lines of text."""
    found = {
        name: float(each["summary"]["percent_covered"]) for name, each in report["files"].items()
    }
    below = sorted((percent, name) for name, percent in found.items() if percent < MARK_PERCENT)
    total = float(report["totals"]["percent_covered"])
    lines = [f"{total:.1f} % of lines and branches in {len(found)} modules"]
    lines += [f"  {percent:5.1f} %  {name}" for percent, name in below]
    lines.append(f"{len(below)} modules are below {MARK_PERCENT:.0f} %")
    return "\n".join(lines)


def _coverage(folder: Path, *command: str) -> int:
    # Absolute: processes that tests start may work in another folder.
    environment = {**os.environ, "COVERAGE_FILE": str(folder / "data")}
    words = [sys.executable, "-m", "coverage", *command]
    return subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
