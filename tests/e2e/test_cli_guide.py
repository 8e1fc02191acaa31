"""The guide of the command line is right: each command runs, and prints what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dist_ckpt.cli import main
from dist_ckpt.cli.app import app
from tests.e2e import guides

GUIDE = guides.guide("cli")


def _as_pattern(text: str) -> str:
    """Return a pattern for output, in which `…` stands for anything."""
    return ".*?".join(map(re.escape, text.split("…")))


def test_each_command_prints_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guides.run(guides.program(GUIDE), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    used = set()
    for block in guides.blocks(GUIDE, "console"):
        for each in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, expected = each.partition("\n")
            program, command, *arguments = shlex.split(line)
            assert program == "dist-ckpt"
            used.add(command)
            with pytest.raises(SystemExit) as ended:
                main([command, *arguments])
            out, err = capsys.readouterr()
            assert (ended.value.code, err) == (0, ""), line
            # Columns are as wide as what is in them, which may be an age.
            loose = [re.sub(r"\s+", " ", text).strip() for text in (expected, out)]
            assert re.fullmatch(_as_pattern(loose[0]), loose[1], re.DOTALL), (line, out)
    known = {command.name for command in app.registered_commands}
    assert used == known, "the guide shows every command"
