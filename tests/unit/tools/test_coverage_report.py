"""What is reached in a process, in one that it starts and in one that it forks is all counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.coverage_report import ROOT, told

PROGRAM = """
import os, subprocess, sys
import dist_ckpt.errors
if sys.argv[1:] == []:
    subprocess.run([sys.executable, __file__, "child"], check=True, cwd=os.path.dirname(__file__))
    if os.fork() == 0:
        import dist_ckpt.events
        os._exit(0)
    os.wait()
else:
    import dist_ckpt.format.names
"""


def _percent(**modules: float) -> dict[str, object]:
    return {
        "totals": {"percent_covered": 90.04},
        "files": {name: {"summary": {"percent_covered": at}} for name, at in modules.items()},
    }


def test_what_is_below_the_mark_is_named_the_lowest_first() -> None:
    assert told(_percent(a=84.9, b=85.0, c=20.0)).splitlines() == [
        "90.0 % of lines and branches in 3 modules",
        "   20.0 %  c",
        "   84.9 %  a",
        "2 modules are below 85 %",
    ]


def test_processes_that_are_started_and_forked_are_counted(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    program = tmp_path / "program" / "main.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "COVERAGE_FILE": str(tmp_path / "data"),
        "PYTHONPATH": str(ROOT),
    }

    def coverage(*words: str) -> None:
        command = [sys.executable, "-m", "coverage", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    coverage("run", str(program))
    coverage("combine", "-q")
    # Each of them was imported by one of the three.
    names = [f"dist_ckpt/{name}.py" for name in ("errors", "events", "format/names")]
    report = str(tmp_path / "report.json")
    coverage("json", "-q", "-o", report, "--include", ",".join(names))
    found = json.loads(Path(report).read_text())["files"]
    for name in names:
        assert found[name]["summary"]["covered_lines"] > 0
