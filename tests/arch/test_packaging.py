"""The metadata of the package agrees with its code, and the constraints pin all of it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.arch.source import ROOT, imports, modules

INTEGRATIONS = ROOT / "dist_ckpt" / "integrations"

IMPORT_NAMES = {
    "check-jsonschema": "check_jsonschema",
    "import-linter": "importlinter",
    "kubeflow-trainer-api": "kubeflow_trainer_api",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "PyYAML": "yaml",
}


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _bare(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def _pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def _third_party(folder: Path) -> set[str]:
    own = {"benchmarks", "dist_ckpt", "tests", "tools", "examples"}
    found = {name for module in modules(folder) for name in imports(module, set())}
    return found - set(sys.stdlib_module_names) - own


def test_dependencies_are_what_the_package_imports() -> None:
    wanted = {IMPORT_NAMES.get(_bare(each), _bare(each)) for each in _project()["dependencies"]}
    # What it ships for tests needs pytest, which whoever uses it has.
    assert _third_party(ROOT / "dist_ckpt") - {"pytest"} - _frameworks() == wanted


def test_each_integration_imports_what_its_extra_declares() -> None:
    extras = _project()["optional-dependencies"]
    declared = {_bare(each) for name in _frameworks() for each in extras[name]}
    needed = {IMPORT_NAMES.get(_bare(each), _bare(each)) for each in _project()["dependencies"]}
    assert _third_party(INTEGRATIONS) - needed == declared


def _frameworks() -> set[str]:
    """Return what is named by modules of the integrations, and is an extra."""
    modules_of = {path.stem for path in INTEGRATIONS.glob("*.py")}
    return modules_of & set(_project()["optional-dependencies"])


def test_tests_and_examples_import_only_what_is_declared() -> None:
    project = _project()
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for extra in ("demo", "yaml", *_frameworks()):
        declared += project["optional-dependencies"][extra]
    names = {IMPORT_NAMES.get(_bare(each), _bare(each)) for each in declared}
    used = set().union(*(_third_party(ROOT / each) for each in ("benchmarks", "examples", "tests")))
    assert used - names == set()


def test_constraints_pin_every_declared_package_exactly() -> None:
    pins = _pins()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    project = _project()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_bare(each) for group in groups for each in group} - {"dist_ckpt"}
    assert declared - {pin.partition("==")[0] for pin in pins} == set()
