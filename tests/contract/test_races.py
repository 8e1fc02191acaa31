"""Sixteen processes commit one step at once: one of them does, and the others are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.services.s3 import S3Service

RACERS = 16
STEP = 7


def check_race(urls: Sequence[str]) -> None:
    program = [sys.executable, "-m", "tests.contract.racing", str(RACERS), str(STEP), *urls]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    winners = [outcome for outcome in outcomes if outcome != "AlreadyExists"]
    assert len(outcomes) == RACERS
    assert len(winners) == 1, f"{outcomes}\n{done.stderr}"
    repository = Repository(resolve(urls[-1]))
    assert repository.steps() == [STEP]
    checkpoint = repository.open(STEP)
    assert checkpoint.manifest.save_id == winners[0]
    assert repository.verify(STEP).ok
    repository.store.close()


def test_local(tmp_path: Path) -> None:
    check_race([str(tmp_path / "run")])


def test_cephfs(shared_folder: Callable[[int], Path]) -> None:
    check_race([str(shared_folder(0)), str(shared_folder(1))])


def test_s3(s3_service: S3Service, s3_name: str) -> None:
    if s3_service.kind == "moto":
        pytest.skip("moto looks first and writes then: its conditions are no protection in a race")
    check_race([s3_service.url(s3_name)])
