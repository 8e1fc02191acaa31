"""When the environment of the checkout is built, and that a failed build does not count."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tools import build_venv


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tools").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(build_venv, "__file__", str(tmp_path / "tools" / "build_venv.py"))
    return tmp_path


class _Commands:
    """Stands in for `subprocess.run`: keeps what it was asked, fails where it is told to."""

    def __init__(self, fail_at: str = "") -> None:
        self.seen: list[list[str]] = []
        self.fail_at = fail_at

    def __call__(
        self, command: list[str], *, cwd: Path, check: bool
    ) -> subprocess.CompletedProcess[str]:
        assert cwd.is_dir()
        assert not check
        self.seen.append(command)
        return subprocess.CompletedProcess(command, 9 if self.fail_at in command else 0)


def _build(monkeypatch: pytest.MonkeyPatch, fail_at: str = "") -> tuple[int, list[list[str]]]:
    commands = _Commands(fail_at)
    monkeypatch.setattr(subprocess, "run", commands)
    return build_venv.main(), commands.seen


def test_second_build_does_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build(monkeypatch)[0] == 0
    os.utime(checkout / "constraints.txt", (1, 1))
    assert _build(monkeypatch) == (0, [])


@pytest.mark.parametrize("name", build_venv.INPUTS)
def test_changed_input_builds_again(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _build(monkeypatch)
    with (checkout / name).open("a") as file:
        file.write("# one more line\n")
    assert len(_build(monkeypatch)[1]) == 4


def test_torch_is_asked_for_by_its_exact_name_before_what_needs_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, seen = _build(monkeypatch)
    assert [command[-1] for command in seen] == [".venv", "setuptools", "torch==2.13.0", ".[dev]"]
    assert all("constraints.txt" in command for command in seen[1:])


@pytest.mark.parametrize("fail_at", ["venv", "torch==2.13.0", ".[dev]"])
def test_failed_build_is_reported_and_does_not_count(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fail_at: str,
) -> None:
    assert _build(monkeypatch, fail_at)[0] == 9
    assert fail_at in capsys.readouterr().err
    assert len(_build(monkeypatch)[1]) == 4


def test_python_without_ensurepip_is_told_what_to_install(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _build(monkeypatch) == (1, [])
    assert "apt install python3-venv" in capsys.readouterr().err
