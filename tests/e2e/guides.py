"""What documents hold for programs: their blocks of code, and their flags."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import runpy
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
    script, said, errors = folder / "guide.py", folder / "guide.out", folder / "guide.err"
    script.write_text(code)
    # Of the server that forks the ranks of other tests, so that torch is not imported again.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dist_ckpt"])
    environment = dict(os.environ)  # that of the server is older
    program = context.Process(target=_program, args=(script, said, errors, environment))
    program.start()
    program.join(120)
    ended = program.exitcode
    program.kill()
    assert ended == 0, errors.read_text()
    return said.read_text()


def _program(script: Path, said: Path, errors: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for number, path in ((1, said), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def check_flags_exist(text: str) -> None:
    """Check that `text` names flags of a training, and none that there is not."""
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    known = parser.format_help()
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert len(named) >= 5
    assert {flag for flag in named if flag not in known} == set()
