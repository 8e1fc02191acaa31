"""A run of three checkpoints, and a shell that the commands run in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.shell import Shell, fill


@pytest.fixture
def url(tmp_path: Path) -> str:
    return fill(str(tmp_path / "run"))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "100")
    return Shell(capsys)
