"""The guide to resuming is right: its Python runs, twice, and its flags exist."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import dist_ckpt
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "resume.md").read_text()


def test_python_runs_and_resumes(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    script = tmp_path / "guide.py"
    script.write_text(code + "\nprint(ckpt.restored is not None and ckpt.restored.step)\n")
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said == ["False", "40"]
    assert Repository(resolve(tmp_path / "runs" / "guide")).steps() == [20, 30, 40]


def test_its_flags_exist() -> None:
    parser = argparse.ArgumentParser()
    dist_ckpt.flags.add_arguments(parser)
    known = parser.format_help()
    flags = set(re.findall(r"--[a-z][a-z-]+", GUIDE))
    assert len(flags) >= 5
    assert {flag for flag in flags if flag not in known} == set()
