"""However a program ends, its last save is committed, or it is told that it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.services.s3 import S3Service

ROOT = Path(__file__).resolve().parents[2]
# How each way ends the process: the exit code, as `subprocess` has it.
ENDS = {
    "last_statement": 0,
    "checkpointer_without_with": 0,
    "dropped": 0,
    "exit_code": 3,
    "exception": 1,
    "exception_in_with": 1,
    "interrupt": -2,
    "terminated_with_handler": 128 + 15,
    "thread_that_goes_on": 0,
    "daemon_thread": 0,
    "at_exit": 0,
    "late_at_exit": 0,
    "forked": 0,
    "forked_after_a_save": 0,
    "process_forked": 0,
}
BEGINS_ANEW = {"process_spawned": 0, "process_of_a_server": 0}
# The pools of threads that such a file system works in are gone by then, for every program.
NEEDS_NO_POOL = {"thread_that_goes_on", "at_exit", "late_at_exit"}
# What differs where a save needs connections: in the suite these, in the soak all of them.
NEEDS_CONNECTIONS = {
    "last_statement",
    "exception",
    "thread_that_goes_on",
    "late_at_exit",
    "forked_after_a_save",
    "process_forked",
}
WITH_POOL = ("last_statement", "interrupt", "process_forked")
LEAVES_NOTHING = {"terminated": -15, "left_at_once": 0}
IS_TOLD = {
    "failed": 120,  # what Python itself ends with when something fails at the very end
    "failed_with_code": 120,
    "failed_with_exception": 120,
    "failed_long_ago": 120,
    "failed_without_close": 120,
    "process_that_fails_to_save": 1,
    "process_that_raises_and_fails_to_save": 1,
}
IS_OVER = ("failed_and_told", "failed_and_cancelled")
WAITS = "dist_ckpt: waiting for the save of step 1 to "
ALONE = ("forked_beside_a_save", "pool_beside_a_signal_policy")

Outcomes = dict[str, tuple[int, str]]


def run(cases: Sequence[tuple[str, str]], folder: Path) -> Outcomes:
    """Return the exit code and the words of each case, by its way and its URL."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "tests.e2e.endings", json.dumps(cases), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=240,
    )
    found = json.loads((folder / "outcomes.json").read_text())
    return {case: (code, said) for case, (code, said) in found.items()}


@dataclass(frozen=True)
class OnDisk:
    """What became of all programs that need no server, which share what is imported."""

    folder: Path
    outcomes: Outcomes

    def of(self, way: str) -> tuple[int, str]:
        return self.outcomes[f"{way} {self.folder}/{way}"]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    folder = tmp_path_factory.mktemp("endings")
    ways = [*ENDS, *LEAVES_NOTHING, *IS_TOLD, *IS_OVER, *ALONE]
    cases = [(way, f"{folder}/{way}") for way in ways]
    cases += [(way, f"gs://{folder}/pool/{way}") for way in WITH_POOL]
    return OnDisk(folder, run(cases, folder / "said"))


def check_committed(found: Outcomes, ends: Mapping[str, int], base: str) -> None:
    for way, code in ends.items():
        url = f"{base}/{way}"
        left, said = found[f"{way} {url}"]
        assert left == code, (way, said)
        stored = Repository(resolve(url.removeprefix("gs://")))
        assert stored.steps()[-1:] == [1], (way, said)
        assert stored.verify(1).ok
        # Nothing is said but what the program raised, and on a slow machine what is waited for.
        others = [line for line in said.splitlines() if not line.startswith(WAITS)]
        own = any("dist_ckpt" in line.replace(str(ROOT), "") for line in others)
        assert not own or code in (1, -2), (way, said)
        assert "ignored" not in said, (way, said)
        assert "Unclosed" not in said, (way, said)


def test_the_last_save_on_a_disk_is_committed(on_disk: OnDisk) -> None:
    check_committed(on_disk.outcomes, ENDS, str(on_disk.folder))


def test_the_last_save_through_a_file_system_with_a_pool_is_committed(on_disk: OnDisk) -> None:
    ends = {way: ENDS[way] for way in WITH_POOL}
    check_committed(on_disk.outcomes, ends, f"gs://{on_disk.folder}/pool")


def run_all(ends: Mapping[str, int], base: str, folder: Path) -> None:
    found = run([(way, f"{base}/{way}") for way in ends], folder)
    check_committed(found, ends, base)


def test_the_last_save_on_s3_is_committed(
    s3_service: S3Service, s3_name: str, tmp_path: Path
) -> None:
    ends = {way: ENDS[way] for way in ENDS if way in NEEDS_CONNECTIONS}
    run_all(ends, s3_service.url(s3_name), tmp_path / "said")
    assert s3_service.uploads(s3_name) == []


@pytest.mark.soak
def test_the_last_save_is_committed_wherever_and_however(
    s3_service: S3Service, s3_name: str, tmp_path: Path
) -> None:
    run_all(ENDS, s3_service.url(s3_name), tmp_path / "on_s3")
    ends = {way: code for way, code in ENDS.items() if way not in NEEDS_NO_POOL}
    run_all(ends, f"gs://{tmp_path}/runs", tmp_path / "with_pool")


@pytest.mark.soak
def test_the_last_save_of_a_process_that_imports_everything_itself_is_committed(
    s3_service: S3Service, s3_name: str, tmp_path: Path
) -> None:
    for number, base in enumerate((str(tmp_path / "runs"), s3_service.url(s3_name))):
        run_all(BEGINS_ANEW, base, tmp_path / f"said{number}")


def test_a_save_that_cannot_be_finished_leaves_nothing_listed(on_disk: OnDisk) -> None:
    for way, code in LEAVES_NOTHING.items():
        assert on_disk.of(way)[0] == code
        assert Repository(resolve(on_disk.folder / way)).steps() == []


def test_a_failure_that_nobody_waited_for_is_told(on_disk: OnDisk) -> None:
    for way, code in IS_TOLD.items():
        left, said = on_disk.of(way)
        assert left == code, (way, said)
        assert said.count("the disk is made of cheese") == 1, (way, said)
        assert f"dist_ckpt: the save of step 1 to {on_disk.folder}/{way} failed" in said, said
        assert "nobody waited for it" in said, said
        assert ("a mistake" in said) == ("raises" in way or "exception" in way), said
        assert "ignored" not in said, said


@pytest.mark.soak
def test_a_failure_in_a_process_that_was_spawned_is_told(tmp_path: Path) -> None:
    way = "spawned_process_that_fails_to_save"
    left, said = run([(way, f"{tmp_path}/run")], tmp_path / "said")[f"{way} {tmp_path}/run"]
    assert left != 0, said
    assert said.count("the disk is made of cheese") == 1, said


def test_a_failure_that_somebody_was_told_of_is_over(on_disk: OnDisk) -> None:
    for way in IS_OVER:
        left, said = on_disk.of(way)
        assert left == 0, said
        assert "nobody" not in said


def test_a_child_leaves_the_saves_of_its_parent_alone(on_disk: OnDisk) -> None:
    left, said = on_disk.of("forked_beside_a_save")
    assert left == 7, said
    assert Repository(resolve(on_disk.folder / "forked_beside_a_save")).verify(1).ok


def test_the_processes_of_a_pool_heed_their_signals(on_disk: OnDisk) -> None:
    left, said = on_disk.of("pool_beside_a_signal_policy")
    assert left == 0, said
    assert Repository(resolve(on_disk.folder / "pool_beside_a_signal_policy")).steps() == [1]
