"""Tests and benchmarks keep to what a module shows: what it keeps for itself none of them touches.

A name with one leading underscore may change with any commit. A test that leans on it then fails
for no reason, or, worse, goes on passing and no longer looks at anything.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from tests.arch.source import PACKAGE, ROOT, Function, Module, modules

# What has no public form, by the end of how it is written, and why it is needed. Nothing of this
# package stands here: what a test needs of it has a public name.
ALLOWED = {
    # Python: private by its look alone.
    "os._exit": "documented; how a forked child ends",
    "sys._current_frames": "documented; what another thread is doing",
    # Python: without a public form.
    "atexit._run_exitfuncs": "calls at the end of a process what is to be called there",
    "parser._actions": "argparse lists its arguments nowhere else",
    # torch: what users and libraries call or define themselves, as no public form does the same.
    "Tensor._make_wrapper_subclass": "makes a tensor that is several behind one face",
    "super()._load_from_state_dict": "documented for modules that load in a way of their own",
    "super()._save_to_state_dict": "its counterpart",
    "torch._foreach_add_": "what optimizers change many tensors with",
    "torch._foreach_copy_": "what arenas are filled with; exchanged where a copy has to be held up",
    "torch._foreach_mul_": "what optimizers change many tensors with",
    "torch.distributed._shard": "the sharded tensors of old checkpoints",
    "torch.distributed.algorithms._checkpoint": "wraps modules for activation checkpointing",
    "torch.distributed.checkpoint._fsspec_filesystem": "where stock DCP is measured on S3",
    "apply_optimizer_in_backward._apply_optimizer_in_backward": "steps within backward",
    "apply_optimizer_in_backward._get_in_backward_optimizers": "the optimizers of that",
    "tensor._version": "torch's own count of the writes to a tensor",
    "torch.utils._pytree": "torch.utils.pytree is not in the oldest torch",
    # torch: what stands in stored files, or in the way of stock DCP.
    "SavePlanner._cached_": "what stock DCP keeps between saves; its name ends in what it is",
    "default_planner._EmptyStateDictLoadPlanner": "what torch converts checkpoints with",
    "filesystem._StorageInfo": "a class that stored metadata is made of",
    "state_dict_loader._load_state_dict": "what torch converts checkpoints with",
    "state_dict_loader._load_state_dict_from_keys": "loads by names alone",
    "torch.distributed.checkpoint._storage_utils": "a user of what is exchanged there",
    # torch: layouts and groups, of which the public side shows less.
    "distributed_c10d._world": "which process groups there are",
    "placement._split_tensor": "where torch says that the elements of a placement lie",
    "placement_types._StridedShard": "a placement of FSDP2 with tensor parallelism",
    "torch.distributed.tensor._dtensor_spec": "makes a DTensor of any placements",
    "torch.testing._internal": "a process group that does nothing",
    # torchao: what its tensors and optimizers are made of.
    "optimizer._new_buffer": "makes a quantized moment",
    "weight._precomputed_scale": "what a float8 weight has beside its values",
    "weight._tensor": "the values behind a float8 weight",
    # torchtitan: the way of a step without CUDA graphs.
    "self._forward_backward_body": "what its Trainer calls itself, chosen in its __init__",
    # transformers: no other method is around all of a save.
    "super()._save_checkpoint": "what a Trainer saves with",
}

# Calls that take the name of a member as a text, alone or at the end of a path.
_BY_TEXT = {
    *("attrgetter", "delattr", "getattr", "getattr_static", "hasattr", "import_module"),
    *("methodcaller", "multiple", "object", "patch", "setattr"),
}
# Of these a member is asked for by its name in brackets.
_MEMBERS = {"__dict__", "vars"}


def is_private(name: str) -> bool:
    """Whether `name` is private: not `__dunder__`, and not `_` alone, which is thrown away."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def up_to_private(path: str) -> str | None:
    """Return a dotted path up to its first private part, None where it has none."""
    parts = path.split(".")
    first = next((number for number, part in enumerate(parts) if is_private(part)), None)
    return None if first is None else ".".join(parts[: first + 1])


@dataclass
class Classes:
    """The private members that classes have for themselves, and what they are derived from.

    Attributes:
        members: by the name of the class.
        bases: the last parts of the names of the bases, by the name of the class.
    """

    members: dict[str, set[str]] = field(default_factory=dict)
    bases: dict[str, set[str]] = field(default_factory=dict)

    def add(self, found: ast.ClassDef) -> None:
        """Note a class; of two of one name both."""
        self.members.setdefault(found.name, set()).update(_defined_in(found))
        self.bases.setdefault(found.name, set()).update(map(_name_of, found.bases))

    def line(self, name: str) -> set[str]:
        """Return `name` and the names of all classes above it."""
        found: set[str] = set()
        left = {name}
        while left:
            found |= left
            left = {base for each in left for base in self.bases.get(each, ())} - found
        return found

    def all_of(self, line: set[str]) -> set[str]:
        """Return the private members of some classes."""
        return {member for name in line for member in self.members.get(name, ())}


def _name_of(node: ast.expr) -> str:
    """Return the last name of what is written, "" where it has none."""
    if isinstance(node, ast.Subscript):
        return _name_of(node.value)
    return getattr(node, "attr", getattr(node, "id", ""))


def _defined_in(found: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(found):
        if isinstance(node, Function) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if _on_self(node) and is_private(node.attr) else []
    for node in found.body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name for name in map(_name_of, targets) if is_private(name))


def _on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


class Touches(ast.NodeVisitor):
    """Collects the private names of others that a module touches, with their lines.

    Args:
        ours: the classes of tests and benchmarks.
        theirs: those of the package.
    """

    def __init__(self, ours: Classes, theirs: Classes) -> None:
        self.found: list[tuple[int, str]] = []
        self._ours = ours
        self._theirs = theirs
        self._lines: list[set[str]] = []
        # Where a program stands that is only a text.
        self._lineno: int | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._lines.append(self._ours.line(node.name))
        above = {base for each in self._lines[-1] for base in self._theirs.line(each)}
        inherited = self._theirs.all_of(above - {node.name})
        for member in sorted({*_defined_in(node)} & inherited):
            self._note(node, f"{node.name}.{member}")
        self.generic_visit(node)
        self._lines.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr) and not (_on_self(node) and self._is_own(node.attr)):
            self._note(node, f"{ast.unparse(node.value)}.{node.attr}")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            self._note(node, up_to_private(each.name))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for each in node.names:
            self._note(node, up_to_private(f"{node.module or ''}.{each.name}"))

    def visit_Call(self, node: ast.Call) -> None:
        if _name_of(node.func) in _BY_TEXT:
            self._look_at_texts(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        member, of = _text(node.slice), node.value
        if is_private(member) and _name_of(of.func if isinstance(of, ast.Call) else of) in _MEMBERS:
            self._note(node, f"{ast.unparse(of)}.{member}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self._look_into(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._look_into(node)
        for each in node.values:
            if isinstance(each, ast.FormattedValue):
                self.visit(each)

    def _look_at_texts(self, node: ast.Call) -> None:
        owner = "" if not node.args or _text(node.args[0]) else f"{ast.unparse(node.args[0])}."
        if owner in ("self.", "cls."):
            return
        for each in node.args[:2]:
            found = up_to_private(_text(each))
            self._note(node, found and f"{owner}{found}")
        for keyword in node.keywords:
            if keyword.arg and is_private(keyword.arg):  # of mock.patch.multiple
                self._note(node, f"{owner}{keyword.arg}")

    def _look_into(self, node: ast.expr) -> None:
        """Look at a text as a program, if it can be one."""
        text = _text(node)
        if "import " not in text and "\n" not in text:
            return
        try:
            program = ast.parse(textwrap.dedent(text))
        except (SyntaxError, UnicodeEncodeError):  # half a character is in no program
            return
        before, self._lineno = self._lineno, self._lineno or node.lineno
        self.visit(program)
        self._lineno = before

    def _is_own(self, member: str) -> bool:
        return any(member in self._ours.all_of(line) for line in self._lines[-1:])

    def _note(self, node: ast.stmt | ast.expr, name: str | None) -> None:
        if name is not None:
            self.found.append((self._lineno or node.lineno, name))


def _text(node: ast.expr) -> str:
    """Return a text in a program, with a letter for what is put in, "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each) or "x" for each in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def classes(found: Sequence[Module]) -> Classes:
    """Return all classes of some modules."""
    every = Classes()
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                every.add(node)
    return every


def allowed_as(name: str) -> str | None:
    """Return under which entry a private name is allowed, None for none."""
    for entry in ALLOWED:
        # What torch keeps under names of one pattern is asked for by a pattern, too.
        is_pattern = entry.endswith("_") and name.startswith(entry)
        if name == entry or name.endswith(f".{entry}") or is_pattern:
            return entry
    return None


@pytest.fixture(scope="module")
def touched() -> dict[str, str]:
    """What is touched, by file and line."""
    ours = [*modules(ROOT / "tests"), *modules(ROOT / "benchmarks")]
    known, theirs = classes(ours), classes(modules(PACKAGE))
    found = {}
    for module in ours:
        if module.name == __name__:
            continue  # its examples are what it looks for
        look = Touches(known, theirs)
        look.visit(module.tree)
        place = module.path.relative_to(ROOT)
        found.update({f"{place}:{lineno}: {name}": name for lineno, name in look.found})
    return found


def test_what_is_private_is_left_alone(touched: dict[str, str]) -> None:
    assert [place for place, name in touched.items() if allowed_as(name) is None] == []


def test_what_is_allowed_is_needed_and_not_of_this_package(touched: dict[str, str]) -> None:
    assert {allowed_as(name) for name in touched.values()} - {None} == ALLOWED.keys()
    assert not [entry for entry in ALLOWED if "dist_ckpt" in entry]


OWN = """
import shelf
from shelf import Shelf

class Mine:
    def __init__(self):
        self._mine = 1
        _ = self._mine

class Upon(Mine):
    def look(self):
        return self._mine, __name__, _helper()
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("book._pages", "book._pages"),
        ("make().book._pages = 3", "make().book._pages"),
        ("shelf._LIMIT", "shelf._LIMIT"),
        ("from shelf import _LIMIT as limit", "shelf._LIMIT"),
        ("from shelf._inner import limit", "shelf._inner"),
        ("import shelf._inner.deep", "shelf._inner"),
        ("monkeypatch.setattr(shelf, '_LIMIT', 3)", "shelf._LIMIT"),
        ("monkeypatch.setattr('shelf.inner._LIMIT', 3)", "shelf.inner._LIMIT"),
        ("patch.setattr(f'{place}._LIMIT', 3)", "x._LIMIT"),
        ("mock.patch.object(shelf, '_LIMIT', 3)", "shelf._LIMIT"),
        ("mock.patch('shelf._LIMIT')", "shelf._LIMIT"),
        ("mock.patch.multiple(shelf, _LIMIT=3)", "shelf._LIMIT"),
        ("getattr(shelf, '_LIMIT', None)", "shelf._LIMIT"),
        ("vars(shelf)['_LIMIT'] = 3", "vars(shelf)._LIMIT"),
        ("shelf.__dict__['_LIMIT'] = 3", "shelf.__dict__._LIMIT"),
        ("run('import shelf; shelf._LIMIT')", "shelf._LIMIT"),
        ("class A:\n def a(self): return self._b", "self._b"),
        ("class A(Shelf):\n def _put(self): pass", "A._put"),
        ("class A(Shelf):\n def a(self): return super()._put()", "super()._put"),
        ("def put(self): return self._put", "self._put"),
    ],
)
def test_each_way_to_touch_something_is_found(line: str, name: str) -> None:
    own, theirs = ast.parse(f"{OWN}\n{line}\n"), Classes({"Shelf": {"_put"}})
    known = Classes()
    for node in ast.walk(own):
        if isinstance(node, ast.ClassDef):
            known.add(node)
    look = Touches(known, theirs)
    look.visit(own)
    assert [found for _, found in look.found] == [name]
