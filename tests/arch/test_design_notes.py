"""The design notes are alike and listed, and what the documents refer to is in a clone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.arch.source import ROOT

FOLDER = ROOT / "docs" / "design"
NOTES = sorted(FOLDER.glob("[0-9]*.md"))
HEADINGS = [
    "Context",
    "Decision",
    "What was measured",
    "What else was considered",
    "Consequences",
]
STATUS = re.compile(r"Status: (accepted|superseded by \[\d{3}\]\(\d{3}-[a-z0-9-]+\.md\))\.")
IDS = [path.stem for path in NOTES]
# What was written before the code, and never was in a clone. Written so that it is not found here.
ELSEWHERE = r"\b(?:DESIG[N]|HOUS[E]|FACT[S]|PAIN[S]|STYL[E])(?:\.md)?\b|\bthe design documen[t]\b"


def _documents() -> list[Path]:
    """Return the Markdown files of a clone: what is tracked, or is about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def _without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(text: str) -> set[str]:
    """Return what links to a heading of this document may name."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_notes_are_numbered_without_a_gap() -> None:
    numbers = [int(path.name[:3]) for path in NOTES]
    assert numbers == list(range(1, len(NOTES) + 1))


@pytest.mark.parametrize("path", NOTES, ids=IDS)
def test_a_note_has_its_title_status_and_headings(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert re.fullmatch(rf"# {path.name[:3]}: .+", lines[0])
    assert lines[1] == ""
    assert STATUS.fullmatch(lines[2]), lines[2]
    assert [line[3:] for line in lines if line.startswith("## ")] == HEADINGS
    # A heading with nothing below it would say less than none.
    for section in re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:]:
        assert section.partition("\n")[2].strip(), section


def test_the_index_has_one_line_for_each_note() -> None:
    rows = re.findall(
        r"^\| \[(\d{3})\]\((\S+)\) \| (.+) \| (.+) \|$",
        (FOLDER / "README.md").read_text(),
        re.MULTILINE,
    )
    assert [row[1] for row in rows] == [path.name for path in NOTES]
    for number, name, what, status in rows:
        lines = (FOLDER / name).read_text().splitlines()
        assert name.startswith(number)
        assert what
        assert lines[2] == f"Status: {status}."


def test_every_relative_link_leads_somewhere() -> None:
    documents = _documents()
    assert len(documents) > 15
    lost = []
    for path in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            file = path.parent / place if place else path
            known = not anchor or file.suffix != ".md" or anchor in _anchors(file.read_text())
            if not file.exists() or not known:
                lost.append(f"{path.relative_to(ROOT)}: {target}")
    assert lost == []


def test_nothing_is_cited_that_a_clone_does_not_have() -> None:
    cited = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in _documents()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(ELSEWHERE, line)
    ]
    assert cited == []
