"""The guide to policies is right: its Python runs, and its flags exist."""

from __future__ import annotations

import re
from pathlib import Path

from dist_ckpt import keep, policy
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides

GUIDE = guides.guide("policies")


def test_python_runs(tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    said = guides.run(code, tmp_path)
    assert "{'val/loss': 2.5}" in said
    assert Repository(resolve(tmp_path / "runs" / "a")).steps() == [50, 80]


def test_its_flags_exist() -> None:
    guides.check_flags_exist(re.sub(r"#SBATCH --\w+", "", GUIDE))


def test_its_policies_exist() -> None:
    for module, name in ((policy, "policy"), (keep, "keep")):
        named = set(re.findall(rf"\b{name}\.([a-z_]+)\(", GUIDE))
        assert named
        assert {each for each in named if not hasattr(module, each)} == set()
