"""A run of three checkpoints, and a shell that the commands run in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.cli.shell import Shell, fill


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that nobody changes."""
    return fill(str(tmp_path_factory.mktemp("filled") / "run"))


@pytest.fixture
def url(filled: str, tmp_path: Path) -> str:
    """A run of the test's own."""
    return shutil.copytree(filled, str(tmp_path / "run"))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "100")
    return Shell(capsys)
