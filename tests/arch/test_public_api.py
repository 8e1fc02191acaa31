"""The names that users have are frozen here: a change of this list is a change for every user."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import dist_ckpt
from tests.arch.source import PACKAGE

NAMES = [
    "Checkpointer",
    "TrainState",
    "PerRank",
    "ElasticSampler",
    "save",
    "async_save",
    "load",
    "load_weights",
    "open_checkpoint",
    "export",
    "import_",
    "average",
    "keep",
    "Run",
    "policy",
    "EarlyStopping",
    "Progress",
    "register_type",
    "errors",
    "events",
    "CheckpointError",
]
# Modules with public names of their own.
MODULES = ["dcp", "flags", "scalars"]


def test_names_are_frozen() -> None:
    assert dist_ckpt.__all__ == NAMES
    # Nor does it give anything else to who asks for one of the texts that it is made of.
    texts = [
        node.value
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert {text for text in texts if hasattr(dist_ckpt, text)} == {*NAMES, *MODULES}


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(dist_ckpt, name)
    assert value.__doc__
    assert getattr(dist_ckpt, name) is value
    assert name in dir(dist_ckpt)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'saev'"):
        _ = dist_ckpt.saev


@pytest.mark.parametrize(
    "statement",
    [
        "import dist_ckpt",
        "import dist_ckpt.errors, dist_ckpt.repository, dist_ckpt.storage, dist_ckpt.format",
        "import dist_ckpt.repository.repository, dist_ckpt.repository.verify",
        "from dist_ckpt import keep, policy, errors, events, CheckpointError",
        "from dist_ckpt import flags, scalars",
        "import dist_ckpt.testing",
    ],
)
def test_import_needs_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
