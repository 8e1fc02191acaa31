"""The examples of docstrings and pages: where they are, and a process that runs them all.

An example is what stands in a fence marked `python`, or behind `>>>`. All of one text are one
program. Run as `python -m tests.e2e.examples FOLDER`, each program in FOLDER runs in its own
folder, in this process; what became of them is left in `outcomes.json`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from doctest import DocTestParser
from pathlib import Path

from tests.arch.source import ROOT, Definition, definitions, modules

OUTCOMES = "outcomes.json"

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MAY_HAVE_ONE = re.compile(r"```|>>>|::$", re.MULTILINE)


def texts() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every docstring and of every page that no other test runs.

    Of modules only those that can have an example: this is asked while tests are collected.
    """
    for module in modules():
        if not _MAY_HAVE_ONE.search(module.text):
            continue
        yield module.name, ast.get_docstring(module.tree) or ""
        for each in definitions(module):
            yield each.name, _docstring(each)
    for page in [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "reference").glob("*.md"))]:
        yield page.relative_to(ROOT).as_posix(), page.read_text()


def programs() -> dict[str, str]:
    """Return the examples by the name of the text that has them."""
    found = {name: "".join([*_FENCE.findall(text), *_doctest(text)]) for name, text in texts()}
    return {name: code for name, code in found.items() if code}


def run_all(folder: Path) -> None:
    """Run the programs in `folder`, each in a folder of its own, and leave what became of them."""
    outcomes = {}
    for script in sorted(folder.glob("*/example.py")):
        os.chdir(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
            outcomes[script.parent.name] = ""
        except BaseException:
            outcomes[script.parent.name] = traceback.format_exc()
    (folder / OUTCOMES).write_text(json.dumps(outcomes))


def _docstring(definition: Definition) -> str:
    return ast.get_docstring(definition.node) or ""


def _doctest(text: str) -> list[str]:
    # What a doctest shows as its result is compared as text.
    lines = []
    for example in DocTestParser().get_examples(text):
        if not example.want:
            lines.append(example.source)
            continue
        wanted, code = example.want.strip(), example.source.strip()
        lines.append(f"_shown = repr({code})\nassert _shown == {wanted!r}, _shown\n")
    return lines


if __name__ == "__main__":
    run_all(Path(sys.argv[1]).resolve())
