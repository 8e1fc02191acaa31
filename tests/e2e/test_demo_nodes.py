"""`make demo NODES=2`: an elastic torchrun loses a host, goes on, and gets it back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo_nodes import REPORT
from examples.demo_parts.launch import ROOT
from tests.services.s3 import S3Service

TIMEOUT_SECONDS = 1800


def demo(folder: Path, *options: str) -> str:
    command = [sys.executable, "examples/demo_nodes.py", "--output", str(folder), *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / REPORT).exists()
    return done.stdout


@pytest.mark.soak
def test_on_one_disk(tmp_path: Path) -> None:
    said = demo(tmp_path / "demo")
    assert "4 workers, then 2, then 4" in said
    assert "all 72 losses equal, in every bit" in said
    assert "each of the 864 samples of the epoch was seen exactly once" in said


@pytest.mark.soak
def test_on_s3(s3_service: S3Service, s3_name: str, tmp_path: Path) -> None:
    assert os.environ.get("AWS_ENDPOINT_URL") == s3_service.endpoint
    assert "proved" in demo(tmp_path / "demo", "--store", s3_service.url(s3_name))
