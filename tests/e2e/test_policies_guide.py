"""The guide to policies is right: its Python runs, and its flags exist."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import dist_ckpt
from dist_ckpt import keep, policy
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "policies.md").read_text()


def test_python_runs(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    script = tmp_path / "guide.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "{'val/loss': 2.5}" in done.stdout
    assert Repository(resolve(tmp_path / "runs" / "a")).steps() == [50, 80]


def test_its_flags_exist() -> None:
    parser = argparse.ArgumentParser()
    dist_ckpt.flags.add_arguments(parser)
    known = parser.format_help()
    flags = set(re.findall(r"--[a-z][a-z-]+", GUIDE))
    assert len(flags) >= 5
    assert {flag for flag in flags if flag not in known} == set()


def test_its_policies_exist() -> None:
    for module, name in ((policy, "policy"), (keep, "keep")):
        named = set(re.findall(rf"\b{name}\.([a-z_]+)\(", GUIDE))
        assert named
        assert {each for each in named if not hasattr(module, each)} == set()
