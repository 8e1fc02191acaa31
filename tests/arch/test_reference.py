"""Every public name has its place in the reference, and every example is one that is run."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt import dcp, storage, testing
from tests.arch.source import ROOT

REFERENCE = ROOT / "docs" / "reference"
# Modules that are public although `dist_ckpt` does not list them.
MODULES = ("options", "flags", "scalars")


def _identifiers(page: Path) -> set[str]:
    return set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))


def _members(page: Path, module: str) -> set[str]:
    """Return the names of `module` that its entry in `page` is limited to."""
    entry = page.read_text().partition(f"::: {module}\n")[2].partition("\n:::")[0]
    return {f"{module}.{name}" for name in re.findall(r"^ +- (\w+)$", entry, re.MULTILINE)}


def _shown() -> set[str]:
    found = set()
    for page in REFERENCE.glob("*.md"):
        for identifier in _identifiers(page):
            found |= {identifier} | _members(page, identifier)
    return found


SHOWN = _shown()


@pytest.mark.parametrize("name", [name for name in dist_ckpt.__all__ if name != "CheckpointError"])
def test_exported_name_is_shown(name: str) -> None:
    assert f"dist_ckpt.{name}" in SHOWN


def test_base_of_errors_is_shown_with_them() -> None:
    assert "dist_ckpt.errors.CheckpointError" in SHOWN


@pytest.mark.parametrize("name", MODULES)
def test_public_module_is_shown(name: str) -> None:
    prefix = f"dist_ckpt.{name}"
    assert any(each == prefix or each.startswith(f"{prefix}.") for each in SHOWN)


@pytest.mark.parametrize("module", [dcp, storage, testing], ids=lambda module: module.__name__)
def test_what_a_public_module_exports_is_shown(module: ModuleType) -> None:
    names = {f"{module.__name__}.{name}" for name in module.__all__}
    assert names - SHOWN == set()


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_what_is_shown_exists(name: str) -> None:
    value: Any = dist_ckpt
    for part in name.split(".")[1:]:
        # A module that was not imported yet is no attribute of its package.
        value = getattr(value, part, None) or import_module(f"{value.__name__}.{part}")


def test_every_flag_is_told_with_its_help() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    dist_ckpt.flags.add_arguments(parser)
    shown = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    page = (REFERENCE / "flags.md").read_text()
    rows = dict(re.findall(r"^\| `(--[\w-]+)[^`]*` \| (.*) \|$", page, re.MULTILINE))
    assert rows == {each.option_strings[0]: each.help for each in shown}


def test_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", (REFERENCE / "index.md").read_text()))
    assert linked == {page.name for page in REFERENCE.glob("*.md")} - {"index.md"}
