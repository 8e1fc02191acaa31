"""Each trainer's own checkpoints and ours, beside each other: it runs, and says what was asked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import trainers

# Frameworks and their libraries give advice by warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

WAYS = {
    "transformers": ["transformers", "dist_ckpt"],
    "accelerate": ["accelerate", "dist_ckpt"],
    "lightning": [
        "Lightning",
        "Lightning AsyncCheckpointIO",
        "dist_ckpt plugin",
        "dist_ckpt strategy",
    ],
    "torchtitan": ["torchtitan", "torchtitan async", "dist_ckpt"],
    "ray": ["Ray", "Ray async", "dist_ckpt"],
}
ROW = re.compile(
    r"^  (?P<way>\S.*?) +blocked +[\d.]+ s a save \([\d.]+ to [\d.]+\), +[\d.]+ s in all, "
    r"+(?P<mib>[\d.]+) MiB; newest cut in half: (?P<torn>.+)$",
    re.MULTILINE,
)


@pytest.mark.soak
@pytest.mark.parametrize("framework", trainers.FRAMEWORKS)
def test_what_is_torn_stops_theirs_and_not_ours(
    framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(framework)
    arguments = [framework, "--place", str(tmp_path), "--repeats", "1", "--scale", "0.01"]
    assert trainers.main(arguments) in (0, 1)
    rows = [match.groupdict() for match in ROW.finditer(capsys.readouterr().out)]
    models = 2 if framework == "transformers" else 1
    assert [row["way"] for row in rows] == WAYS[framework] * models
    assert all(float(row["mib"]) > 0 for row in rows)
    for row in rows:
        said = "goes on from step 6" if row["way"].startswith("dist_ckpt") else "does not start"
        assert said in row["torn"]
    assert list(tmp_path.iterdir()) == []


def test_a_framework_that_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.startswith("benchmarks.trainers_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchtitan.components.checkpointer", None)
    assert trainers.main(["torchtitan", "--place", str(tmp_path)]) == 0
    assert "NOT MEASURED: torchtitan cannot be imported" in capsys.readouterr().out
