"""What documents hold for programs: their blocks of code, and their flags."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from dist_ckpt import flags

_GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"


def guide(name: str) -> str:
    """Return the text of a guide."""
    return (_GUIDES / f"{name}.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of `text` that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def program(text: str) -> str:
    """Return all blocks of Python as one program."""
    return "\n".join(blocks(text, "python"))


def run(code: str, folder: Path) -> str:
    """Run `code` in `folder`, in a process of its own that must succeed; return what it prints."""
    script = folder / "guide.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_flags_exist(text: str) -> None:
    """Check that `text` names flags of a training, and none that there is not."""
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    known = parser.format_help()
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert len(named) >= 5
    assert {flag for flag in named if flag not in known} == set()
