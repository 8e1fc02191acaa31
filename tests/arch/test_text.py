"""What no file of the project may say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.source import ROOT

FOLDERS = (".ci", "benchmarks", "deploy", "dist_ckpt", "docs", "examples", "tests", "tools")
SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".cfg", ".yml", ".yaml", ""}

# Written so that no pattern is found in its own text.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w./-])/(?:root|home|Users|work|mnt)/(?!someone)\w",
    "work left for later": r"\b(?:TOD[O]|FIXM[E]|XX[X])\b",
}
NO_SLEEPS = r"\bslee[p]\("


def _files() -> Iterator[Path]:
    yield from (
        path
        for path in ROOT.iterdir()
        if path.is_file() and path.suffix in SUFFIXES and path.name != ".git"
    )
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                yield path


def _lines_with(pattern: str, *, folder: str = "") -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for path in _files()
        if (name := str(path.relative_to(ROOT))).startswith(folder)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_text_has_none(what: str) -> None:
    assert _lines_with(FORBIDDEN[what]) == []


def test_tests_do_not_sleep() -> None:
    assert _lines_with(NO_SLEEPS, folder="tests") == []
