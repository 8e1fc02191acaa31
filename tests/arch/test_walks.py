"""The ways of a save and a load: as short as they were, and as docs/architecture.md says."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.arch.source import PACKAGE, ROOT, imports, modules
from tests.arch.walk import Walk

# How many modules each way may enter: what it is now. Fewer is better; more needs a reason.
# What was wanted, and how it was reached, is in docs/design/014.
MODULES_ENTERED = {"save": 38, "restore": 42, "slice": 20}
SINGLE_IMPORTERS = 22
COMMANDS = "dist_ckpt.cli"

SECTIONS = {"save": "## The way of a save", "restore": "## The way of a load"}
_HOP = re.compile(r"^\d+\. `([\w/]+\.py)`: `([\w.]+)`", re.MULTILINE)
_NAMED = re.compile(r"`((?:\w+/)*\w+\.py)`")


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Walk]:
    folder = tmp_path_factory.mktemp("walk") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "tests.arch.walk", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=240,
    )
    found = json.loads(done.stdout)
    return {name: [(module, function) for module, function in walk] for name, walk in found.items()}


def test_the_ways_are_short(walks: dict[str, Walk], capsys: pytest.CaptureFixture[str]) -> None:
    entered = {name: len({module for module, _ in walk}) for name, walk in walks.items()}
    functions = {name: len(walk) for name, walk in walks.items()}
    with capsys.disabled():
        sys.stdout.write(f"\nmodules entered: {entered}; functions: {functions}\n")
    over = {name: count for name, count in entered.items() if count > MODULES_ENTERED[name]}
    assert over == {}


def _section(name: str) -> str:
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.split(SECTIONS[name])[1].split("\n## ")[0]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_documented_way_is_the_way_taken(name: str, walks: dict[str, Walk]) -> None:
    hops = _HOP.findall(_section(name))
    assert len(hops) > 15
    order = {hop: number for number, hop in enumerate(walks[name])}
    assert [hop for hop in hops if hop not in order] == []
    # What runs on two threads has no fixed order; each thread for itself has one.
    threads = [hops] if name == "restore" else [hops[:12], hops[12:20]]
    for each in threads:
        numbers = [order[hop] for hop in each]
        assert numbers == sorted(numbers), [
            each[i] for i in range(1, len(each)) if numbers[i] < numbers[i - 1]
        ]


def test_named_files_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert {name for name in _NAMED.findall(text) if not (PACKAGE / name).exists()} == set()


def test_few_modules_serve_one_other_module_alone() -> None:
    found = modules()
    known = {module.name for module in found}
    users: dict[str, set[str]] = {module.name: set() for module in found}
    for module in found:
        for name in imports(module, known) & known - {module.name}:
            users[name].add(module.name)
    # The groups of commands have the command line as their one user, and are meant to.
    single = sorted(
        name for name, by in users.items() if len(by) == 1 and not name.startswith(COMMANDS)
    )
    assert len(single) <= SINGLE_IMPORTERS, single
