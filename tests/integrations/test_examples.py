"""Every example in the docstring of an integration runs as it stands, in an empty folder."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.e2e.examples import programs

PROGRAMS = {
    name: code for name, code in programs().items() if name.startswith("dist_ckpt.integrations.")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framework = name.split(".")[2]
    pytest.importorskip(framework, reason="an extra that the tests do without")
    script = tmp_path / "example.py"
    script.write_text(PROGRAMS[name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


def test_they_are_found() -> None:
    assert {name.split(".")[2] for name in PROGRAMS} >= {"accelerate", "lightning"}
