"""The package as syntax trees: what the tests of this folder measure."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_ckpt"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file; `name` is its dotted name."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def nlines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True)
class Definition:
    """A class or a function at the top of a module or of a class, with its dotted name."""

    name: str
    node: ast.ClassDef | Function

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@cache
def modules(folder: Path = PACKAGE) -> tuple[Module, ...]:
    """Return the modules under `folder`, sorted by name: each is parsed once in a process."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(Module(".".join(parts).removesuffix(".__init__"), path))
    return tuple(found)


def definitions(module: Module) -> Iterator[Definition]:
    """Yield classes, functions and methods; overloads are left out, as they define nothing."""
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            yield Definition(f"{module.name}.{node.name}", node)
            for inner in node.body:
                if isinstance(inner, Function) and not _is_overload(inner):
                    yield Definition(f"{module.name}.{node.name}.{inner.name}", inner)
        elif isinstance(node, Function) and not _is_overload(node):
            yield Definition(f"{module.name}.{node.name}", node)


def functions(module: Module) -> Iterator[Function]:
    """Yield every function of the module, nested ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            yield node


def nlines(node: ast.AST) -> int:
    """Return how many lines `node` takes in its file, docstring included."""
    return (getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0) + 1


def imports(module: Module, known: set[str]) -> set[str]:
    """Return what the module imports, as the names in `known` or else the top-level package.

    What a package's `__init__` names for type checkers only is not imported.
    """
    found: set[str] = set()
    for node in _running(module.tree, skip_typing=module.path.name == "__init__.py"):
        if isinstance(node, ast.Import):
            found |= {_nearest(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {_nearest(f"{base}.{alias.name}", known) for alias in node.names}
    return found


def comment_ratio(all_modules: Sequence[Module]) -> float:
    """Return the lines with a comment per line of code, docstrings and blank lines left out."""
    comments = code = 0
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for module in all_modules:
        docs = _docstring_lines(module.tree)
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in layout:
                lines.update(range(token.start[0], token.end[0] + 1))
        code += len(lines - docs)
    return comments / max(1, code)


def _is_overload(node: Function) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)


def _running(tree: ast.Module, *, skip_typing: bool) -> Iterator[ast.AST]:
    for statement in tree.body:
        guard = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        if not (guard and skip_typing):
            yield from ast.walk(statement)


def _nearest(name: str, known: set[str]) -> str:
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines
