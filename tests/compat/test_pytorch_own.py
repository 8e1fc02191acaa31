"""PyTorch's own tests of DCP, run as they are and once more with our Writer and Reader.

`PYTORCH_TESTS=` names a checkout of PyTorch whose version is near that of the torch in use; nothing
of it is kept here. What passes with torch's storage passes with ours, but for what the guide lists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.e2e import guides

pytestmark = pytest.mark.soak

_HERE = Path(__file__).resolve().parent
_FOLDER = "test/distributed/checkpoint"
_CHECKOUT = os.environ.get("PYTORCH_TESTS", "")
_LIMIT_SECONDS = 1800


def modules() -> list[str]:
    folder = Path(_CHECKOUT, _FOLDER)
    found = folder.rglob("test_*.py") if _CHECKOUT else ()
    return sorted(str(path.relative_to(folder)) for path in found)


def passed(module: str, report: Path, *first: Path) -> set[str]:
    """Run a module of the checkout with `first` in front of the path; return what passed."""
    folder = Path(_CHECKOUT, _FOLDER)
    paths = [*first, _HERE.parents[1], folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    # None of our settings: what is there is PyTorch's.
    command += ["-c", os.devnull, "--rootdir", str(folder), f"--junitxml={report}", module]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_SECONDS,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    cases = ET.parse(report).iter("testcase")  # written by the pytest above
    return {
        case.get("name", "")
        for case in cases
        if not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped"))
    }


def listed() -> set[str]:
    """Return the tests that the guide says to differ."""
    return set(re.findall(r"^\| `(test_\w+)`", guides.guide("dcp"), re.MULTILINE))


@pytest.mark.skipif(not _CHECKOUT, reason="PYTORCH_TESTS names no checkout of PyTorch")
@pytest.mark.parametrize("module", modules())
def test_what_passes_with_torch_passes_with_us(module: str, tmp_path: Path) -> None:
    stock = passed(module, tmp_path / "stock.xml")
    ours = passed(module, tmp_path / "ours.xml", _HERE / "as_stock")
    different = stock - ours
    intended = {name for name in different if any(name.startswith(each) for each in listed())}
    assert different - intended == set()
