"""The guide of the command line is right: each command runs, and prints what stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ckpt.cli.app import app
from tests.e2e import guides

GUIDE = guides.guide("cli")


def test_each_command_prints_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guides.run(guides.program(GUIDE), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    used = set()
    for command, code, out, err in guides.outcomes(GUIDE, capsys):
        used.add(command.words[0])
        assert (code, err) == (command.code, ""), command.line
        assert command.prints(out), (command.line, out)
    known = {command.name for command in app.registered_commands}
    assert used == known, "the guide shows every command"
