"""What other versions are tried, and what is said of those that cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import test_matrix as matrix

ROOT = Path(__file__).resolve().parents[3]
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


def _seen(*results: str) -> list[matrix.Seen]:
    return [matrix.Seen("3.12", "2.8.0", each, "why") for each in results]


def test_every_python_meets_the_oldest_and_the_newest_torch() -> None:
    oldest = matrix.oldest_torch(ROOT)
    found = matrix.pairs([], oldest)
    assert oldest == "2.6.0"
    assert set(found) == {(each, torch) for each in matrix.PYTHONS for torch in (oldest, "newest")}


def test_pairs_can_be_named() -> None:
    assert matrix.pairs(["3.12-2.8.0", "3.13-2.13.0+cpu"], "2.6.0") == [
        ("3.12", "2.8.0"),
        ("3.13", "2.13.0+cpu"),
    ]
    with pytest.raises(SystemExit, match=r"2\.8\.0"):
        matrix.pairs(["2.8.0"], "2.6.0")


def test_environments_have_the_pins_but_no_other_torch() -> None:
    names = {pin.partition("==")[0] for pin in matrix.pins(ROOT)}
    assert {"msgspec", "numpy", "pytest", "s3fs", "xxhash"} <= names
    assert names & {"torch", "torchsnapshot", "bitsandbytes"} == set()


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (["passed"], 0),
        (["passed", "not to be had"], 0),
        (["passed", "failed"], 1),
        (["not to be had"], 1),
        ([], 1),
    ],
)
def test_what_cannot_be_had_is_no_failure_but_proves_nothing(
    results: list[str], expected: int
) -> None:
    assert matrix.status(_seen(*results)) == expected


def test_table_names_each_pair_with_its_reason() -> None:
    lines = matrix.table(_seen("passed", "not to be had")).splitlines()
    assert lines[1].split() == ["3.12", "2.8.0", "passed", "why"]
    assert lines[2].split() == ["3.12", "2.8.0", "not", "to", "be", "had", "why"]


def test_reason_is_what_pip_says_last() -> None:
    error = (
        "WARNING: something else\n"
        "ERROR: Could not find a version that satisfies torch==9 (from versions: 1, 2)\n"
        "ERROR: No matching distribution found for torch==9\n"
    )
    assert matrix.reason(error) == "No matching distribution found for torch==9"
    assert matrix.reason("a traceback\nOSError: gone\n") == "OSError: gone"
    assert matrix.reason("") == "pip said nothing"


def test_own_interpreter_is_found_and_an_unknown_one_is_told(tmp_path: Path) -> None:
    assert matrix.interpreter(OWN, []) == Path(sys.executable)
    with pytest.raises(matrix.Missing, match=r"no python9\.9"):
        matrix.interpreter("9.9", [tmp_path])


def test_interpreter_of_pyenv_is_found_and_one_that_does_not_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    for patch, answer in (("9", f"echo {OWN}"), ("10", "exit 127"), ("2", "echo 3.0")):
        program = tmp_path / f"{OWN}.{patch}" / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o755)
    assert matrix.interpreter(OWN, [tmp_path]) == tmp_path / f"{OWN}.9" / "bin" / "python"
