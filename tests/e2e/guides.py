"""What documents hold for programs: their blocks of code, and their flags."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_ckpt import flags
from dist_ckpt.cli import main
from dist_ckpt.testing.ranks import PRELOAD

ERRORS = "guide.err"
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


@dataclass(frozen=True)
class Command:
    """A command of `dist-ckpt` as a guide shows it.

    Attributes:
        line: as it stands there.
        words: what the program gets.
        code: the exit code that a remark behind it names, else 0.
        output: what it prints; `…` stands for anything.
    """

    line: str
    words: list[str]
    code: int
    output: str

    def prints(self, said: str) -> bool:
        """Return whether `said` is the output, where columns may have other widths."""
        # Columns are as wide as what is in them, which may be an age.
        wanted, found = (re.sub(r"\s+", " ", text).strip() for text in (self.output, said))
        pattern = ".*?".join(map(re.escape, wanted.split("…")))
        return re.fullmatch(pattern, found, re.DOTALL) is not None


def commands(text: str) -> Iterator[Command]:
    """Yield the commands of all consoles in `text`, which all call `dist-ckpt`."""
    for block in blocks(text, "console"):
        for each in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, output = each.partition("\n")
            program, *words = shlex.split(line, comments=True)
            assert program == "dist-ckpt", line
            named = re.search(r"# exit code (\d+)$", line)
            yield Command(line, words, int(named[1]) if named else 0, output)


def run(code: str, folder: Path, *, limit_seconds: int = 120) -> str:
    """Run `code` in `folder`, in a process of its own that must succeed; return what it prints.

    What it says on standard error is left in the file `ERRORS` of the folder.
    """
    script, said, errors = folder / "guide.py", folder / "guide.out", folder / ERRORS
    script.write_text(code)
    # Of the server that forks the ranks of other tests, so that torch is not imported again.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    environment = dict(os.environ)  # that of the server is older
    program = context.Process(target=_program, args=(script, said, errors, environment))
    program.start()
    program.join(limit_seconds)
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


def outcomes(
    text: str, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[Command, object, str, str]]:
    """Run the commands of a guide in turn; yield each with its exit code, output and errors."""
    for command in commands(text):
        with pytest.raises(SystemExit) as ended:
            main(command.words)
        yield command, ended.value.code, *capsys.readouterr()
