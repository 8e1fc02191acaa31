"""Copies and exports are measured, and nothing is left of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import doors


def test_a_local_disk_is_measured_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doors.main(["local", "--place", str(tmp_path / "place"), "--mib", "16", "--repeats", "1"])
    text = capsys.readouterr().out
    assert "On a local disk, cold" in text
    assert "export against a plain copy" in text
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SystemExit):
        doors.main(["tape"])
