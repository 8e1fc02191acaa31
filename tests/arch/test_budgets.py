"""The budgets of the design, measured on the syntax of the whole package."""

from __future__ import annotations

import ast
import graphlib
import sys
from functools import cache
from statistics import median, quantiles
from types import ModuleType

import pytest

import dist_ckpt
from tests.arch.source import (
    ROOT,
    Definition,
    Function,
    comment_ratio,
    definitions,
    functions,
    imports,
    modules,
    nlines,
)

MODULES = modules()

MODULE_LINES = 800
FUNCTION_LINES = 60
FUNCTION_LINES_P90 = 35
EXPORTED_NAMES = 21
STORE_METHODS = 8
PARAMETERS = 8
# What follows is named by the caller: two positions read by themselves (a state and a place, a key
# and its bytes); functions that only the package calls may have four, alike in kind.
POSITIONS_EXPORTED = 2
POSITIONS = 4
COMMENTS = (0.07, 0.12)
"""How many lines of comment there are for a line of code: fewer leave reasons out, more bury it."""

THROUGH_MODULE = {"decode", "encode", "every"}


def test_modules_are_short() -> None:
    assert {m.name: m.nlines for m in MODULES if m.nlines > MODULE_LINES} == {}


def test_functions_are_short() -> None:
    sizes = {
        f"{module.name}:{function.name}": nlines(function)
        for module in MODULES
        for function in functions(module)
    }
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}
    assert quantiles(sizes.values(), n=10)[-1] <= FUNCTION_LINES_P90


def test_exported_names_are_few() -> None:
    assert len(dist_ckpt.__all__) <= EXPORTED_NAMES


def test_a_backend_has_few_methods_to_write() -> None:
    store = next(each for each in _definitions() if each.name == "dist_ckpt.storage.base.Store")
    methods = [
        node for node in store.node.body if isinstance(node, Function) and not _is_property(node)
    ]
    assert 0 < len(methods) <= STORE_METHODS


def test_calls_take_few_parameters() -> None:
    over = {each.name for each in _public_calls() if _parameters(each)[1] > PARAMETERS}
    assert over == set()


def test_parameters_are_named_by_the_caller() -> None:
    over = {}
    for each in _public_calls():
        positions, _ = _parameters(each)
        limit = POSITIONS_EXPORTED if _is_exported(each) else POSITIONS
        if positions > limit:
            over[each.name] = positions
    assert over == {}


def test_public_names_have_a_docstring() -> None:
    bare = [m.name for m in MODULES if ast.get_docstring(m.tree) is None]
    bare += [d.name for d in _definitions() if d.is_public and ast.get_docstring(d.node) is None]
    assert bare == []


def test_functions_are_annotated() -> None:
    bare = [
        f"{module.name}:{function.name}"
        for module in MODULES
        for function in functions(module)
        if function.returns is None
    ]
    assert bare == []


def test_imports_stand_at_the_top() -> None:
    inside = [
        f"{module.name}:{node.lineno}"
        for module in MODULES
        for function in functions(module)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


def test_imports_have_no_cycle() -> None:
    known = {module.name for module in MODULES}
    graph = {m.name: imports(m, known) & known - {m.name} for m in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_only_dcp_knows_distributed_checkpoint() -> None:
    known = {"torch.distributed.checkpoint"}
    users = {m.name for m in MODULES if imports(m, known) & known}
    assert {name.rpartition(".")[0] for name in users} == {
        "dist_ckpt.dcp",
        "dist_ckpt.planning",
    }


def test_a_public_name_means_one_thing() -> None:
    homes: dict[str, set[str]] = {}
    for each in _definitions():
        home, _, name = each.name.rpartition(".")
        if home in {module.name for module in MODULES} and not name.startswith("_"):
            homes.setdefault(name, set()).add(home)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    # These are used through their module only: `manifest_format.decode`, `policy.every`.
    assert {name: found for name, found in twice.items() if name not in THROUGH_MODULE} == {}
    assert twice.keys() >= THROUGH_MODULE


def test_reasons_stand_in_the_code() -> None:
    least, most = COMMENTS
    assert least <= comment_ratio(MODULES) <= most


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [nlines(function) for module in MODULES for function in functions(module)]
    source = sum(module.nlines for module in MODULES)
    tests = sum(module.nlines for module in modules(ROOT / "tests"))
    deciles = quantiles(sizes, n=10)
    report = (
        f"{len(MODULES)} modules, median {median(m.nlines for m in MODULES):.0f} lines; "
        f"{len(sizes)} functions, median {median(sizes):.0f}, p90 {deciles[-1]:.0f}, "
        f"max {max(sizes)} lines; {comment_ratio(MODULES):.1%} comments; "
        f"{tests / source:.2f} test lines per source line"
    )
    with capsys.disabled():
        sys.stdout.write(f"\nbudgets: {report}\n")


@cache
def _definitions() -> tuple[Definition, ...]:
    return tuple(each for module in MODULES for each in definitions(module))


def _public_calls() -> list[Definition]:
    return [
        each for each in _definitions() if each.is_public and isinstance(each.node, ast.FunctionDef)
    ]


def _is_property(node: Function) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)


def _is_exported(each: Definition) -> bool:
    return any(each.name == home or each.name.startswith(f"{home}.") for home in _homes())


@cache
def _homes() -> frozenset[str]:
    """Return where the exported names live: modules, classes and functions."""
    found = [getattr(dist_ckpt, name) for name in dist_ckpt.__all__]
    return frozenset(
        each.__name__ if isinstance(each, ModuleType) else f"{each.__module__}.{each.__qualname__}"
        for each in found
    )


def _parameters(each: Definition) -> tuple[int, int]:
    """Return how many parameters have a position, and how many there are; `self` is none."""
    assert isinstance(each.node, ast.FunctionDef)
    arguments = each.node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in ("self", "cls"):
        positional = positional[1:]
    return len(positional), len(positional) + len(arguments.kwonlyargs)
