"""The guide to debugging is right: its blocks run, and it names all that can be met."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from dist_ckpt import errors, events
from dist_ckpt.errors import CheckpointError, ErrorKind
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.arch.source import modules
from tests.e2e import guides

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "debugging.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)

# Every message is longer; what is not holds a message that is made elsewhere.
_SHORTEST = 15

# How the program of the guide runs a shell block: as a person would, and it may not fail.
SHELL = """
import subprocess as _shell
_shell.run(["bash", "-euo", "pipefail", "-c", {text!r}], check=True)
"""

# What the text says and no block does.
CLAIMS = """
signal.raise_signal(signal.SIGUSR1)
told = [json.loads(line)["event"] for line in open("events.0.jsonl")]
assert told.count("SaveCommitted") == 5 and told.count("CheckpointRefused") == 2, told
try:
    dist_ckpt.load(training(), "runs/copy")
    raise SystemExit("the newest is damaged, and load takes no other one")
except dist_ckpt.errors.IntegrityError as error:
    assert error.kind == "truncated"
shutil.copytree("runs/17", "runs/half")
next(Path("runs/half/step-0000000050").glob("*/extra.*")).unlink()
assert dist_ckpt.load(training(), "runs/half", step=50, only=["model"]).step == 50
"""

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, CheckpointError)
]
EVENTS = [each for _, each in inspect.getmembers(events, inspect.isclass) if is_dataclass(each)]


def _sections() -> dict[str, str]:
    """Return what the guide says of each class of error, by the name of the class."""
    found = re.findall(r"^### `(\w+)`(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL)
    return dict(found)


def _rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of tables but their heads, the first cell as it stands."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def _raised() -> Iterator[tuple[str, ErrorKind]]:
    """Yield class and kind of every error that the package makes, as far as they stand there."""
    names = {each.__name__: each for each in CLASSES}
    for module in modules():
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            cls = names.get(node.func.id)
            given = [word.value for word in node.keywords if word.arg == "kind"]
            if cls is None or cls is CheckpointError:
                continue
            kinds = {
                ErrorKind[each.attr]
                for value in given
                for each in ast.walk(value)
                if isinstance(each, ast.Attribute) and each.attr in ErrorKind.__members__
            }
            yield from ((cls.__name__, kind) for kind in kinds or {cls.default_kind})


def _texts(node: ast.expr) -> str:
    """Return the text of a literal, with a mark for what is filled in; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(?:\.\dg|[srd])", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_texts(each) or "\0" for each in node.values)
    return ""


def _warnings() -> set[str]:
    """Return what the package says to the log, each with marks for what is filled in."""
    found = set()
    for module in modules():
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("warning", "tell_once", "_say", "_say_once"):
                prefix = "part \0: " if name == "_say_once" else ""
                found |= {prefix + text for text in map(_texts, node.args)}
    # What says next to nothing by itself is filled in from elsewhere, or is no message.
    return {text for text in found if len(text.replace("\0", "")) > _SHORTEST}


def _quoted() -> list[str]:
    """Return the messages in the table of warnings, each as a pattern."""
    table = GUIDE.partition("### The log")[2].partition("### Events")[0]
    quoted = [each for row in _rows(table) for each in re.findall(r"`([^`]+)`", row[0])]
    return [".*".join(map(re.escape, each.split("…"))) for each in quoted]


def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [text if kind == "python" else SHELL.format(text=text) for kind, text in BLOCKS]
    assert {kind for kind, _ in BLOCKS} == {"python", "sh"}
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    said = guides.run("\n".join(code) + CLAIMS, tmp_path)
    errors = (tmp_path / guides.ERRORS).read_text()
    for expected in ("50 step 50 in ", "40 step 40 in ", "30 is whole", "NotFound no_run {}"):
        assert expected in said
    assert "passed over 40 because step 40 in " in said
    assert "hidden: []" in said
    assert "truncated step 50 in " in said
    assert '"save_id"' in said
    assert re.search(r"WARNING dist_ckpt: step 50 in \S+ was passed over", errors)
    assert "most recent call first" in errors, "the stacks that SIGUSR1 shows"
    report = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"files.txt", "claims", "events.0.jsonl", "step-0000000050.json"} <= report
    assert Repository(resolve(tmp_path / "runs" / "17")).steps() == [30, 40, 50]


def test_every_kind_and_event_is_named() -> None:
    words = set(re.findall(r"`(\w+)`", GUIDE))
    assert {str(kind) for kind in ErrorKind} - words == set()
    assert {each.__name__ for each in EVENTS} - words == set()


def test_every_class_has_a_section_with_its_kinds() -> None:
    sections = _sections()
    assert set(sections) == {each.__name__ for each in CLASSES}
    for cls, kind in set(_raised()):
        assert f"| `{kind}` |" in sections[cls], (cls, kind)


@pytest.mark.parametrize("name", _sections())
def test_every_kind_has_what_happened_and_what_to_do(name: str) -> None:
    rows = _rows(_sections()[name])
    assert rows
    for row in rows:
        kind, happened, do, never = row
        assert kind.strip("`") in list(ErrorKind)
        assert happened
        assert do or "as for" in happened
        # What may be good is never deleted. Only what an error itself names may be, and it says so.
        assert not re.search(r"\b(delete|remove|rm)\b", do), never


def test_every_warning_is_in_the_table() -> None:
    said, quoted = _warnings(), _quoted()
    assert len(said) > 20
    unknown = [text for text in said if not any(re.match(q, text, re.DOTALL) for q in quoted)]
    assert unknown == []
    # An error that a warning passes on is made elsewhere.
    nodes = (node for module in modules() for node in ast.walk(module.tree))
    made = {_texts(node) for node in nodes if isinstance(node, ast.JoinedStr)}
    unsaid = [q for q in quoted if not any(re.match(q, text, re.DOTALL) for text in said | made)]
    assert unsaid == [], "what the guide quotes is what is said"
