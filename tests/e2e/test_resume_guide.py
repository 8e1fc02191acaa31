"""The guide to resuming is right: its Python runs, twice, and its flags exist."""

from __future__ import annotations

from pathlib import Path

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides

GUIDE = guides.guide("resume")


def test_python_runs_and_resumes(tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    code += "\nprint(ckpt.restored is not None and ckpt.restored.step)\n"
    said = [guides.run(code, tmp_path).strip() for _ in range(2)]
    assert said == ["False", "40"]
    assert Repository(resolve(tmp_path / "runs" / "guide")).steps() == [20, 30, 40]


def test_its_flags_exist() -> None:
    guides.check_flags_exist(GUIDE)
