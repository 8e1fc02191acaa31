"""Every example in a docstring or in the reference runs as it stands, in an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.arch.source import ROOT
from tests.e2e.examples import OUTCOMES, programs, texts

# What needs another framework is run where that is imported anyway: tests/integrations.
PROGRAMS = {
    name: code
    for name, code in programs().items()
    if not name.startswith("dist_ckpt.integrations.")
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each: "", or how it failed."""
    folder = tmp_path_factory.mktemp("examples")
    for name, code in PROGRAMS.items():
        own = folder / name.replace("/", "_")
        own.mkdir()
        (own / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.examples", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((folder / OUTCOMES).read_text())
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name.replace("/", "_")] == ""


def test_they_are_found() -> None:
    assert {"dist_ckpt.checkpointer.Checkpointer", "dist_ckpt.policy", "docs/index.md"} <= set(
        PROGRAMS
    )


def test_code_stands_in_fences() -> None:
    # Two colons before an indented block are code to Sphinx, and text to everybody else.
    assert [name for name, text in texts() if re.search(r"::$", text, re.MULTILINE)] == []


def test_fences_say_what_is_in_them() -> None:
    fences = {fence for _, text in texts() for fence in re.findall(r"^```.*$", text, re.MULTILINE)}
    assert fences == {"```", "```python", "```text"}
