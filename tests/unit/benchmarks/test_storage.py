"""The benchmarks measure what they say, and still run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import local, storage
from benchmarks.measure import Case, Samples, interleave, table, verdict
from dist_ckpt.storage.disk import aligned_buffer

_TAKES_32_MIB = """
from benchmarks.measure import Case, interleave
(samples,) = interleave([Case("takes", lambda: b"1" * (32 << 20))], repeats=1).values()
print(samples.extra_bytes[0])
"""


def test_cases_are_run_in_turn_to_and_fro() -> None:
    calls: list[str] = []

    def noted(text: str) -> Callable[[], None]:
        return lambda: calls.append(text)

    cases = [
        Case(name, noted(name), before=noted(f"({name}"), after=noted(f"{name})")) for name in "ab"
    ]
    samples = interleave(cases, repeats=2)
    assert "".join(calls) == "(bbb)(aaa)" + "(aaa)(bbb)" + "(bbb)(aaa)"
    assert [len(each.seconds) for each in samples.values()] == [2, 2]


def test_memory_that_a_case_takes_is_seen() -> None:
    # In a process of its own: what this one has freed it would use again, and take nothing.
    seen = subprocess.run(
        [sys.executable, "-c", _TAKES_32_MIB], check=True, capture_output=True, text=True
    )
    assert int(seen.stdout) >= 31 << 20  # the system counts pages in lots


def test_ratios_are_to_the_fastest_limit(capsys: pytest.CaptureFixture[str]) -> None:
    samples = {
        "ours": Samples([3.0, 9.0, 3.3], [0, 5 << 20, 0]),
        "slow": Samples([6.0, 6.0, 6.0], [0, 0, 0]),
        "fast": Samples([2.0, 3.0, 9.0], [0, 0, 0]),
    }
    ratios = table("Upload", samples, nbytes=3 << 30, limits=["slow", "fast"])
    assert ratios == pytest.approx({"ours": 1.1, "slow": 2.0, "fast": 1.0})
    assert verdict("upload", ratios["ours"], target=1.25)
    assert not verdict("upload", ratios["ours"], target=1.05)
    text = capsys.readouterr().out
    assert "Upload, 3.00 GiB, medians of 3" in text
    assert "3.300  (3.000 to 9.000)   0.91   1.10          5" in text
    assert "target 1.25: met" in text
    assert "target 1.05: MISSED" in text


def test_local_disk_is_measured_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = aligned_buffer(64 << 20)
    data[:] = os.urandom(1 << 20) * 64
    local.run(tmp_path / "place", data, repeats=1)
    text = capsys.readouterr().out
    assert text.count("raw limit ") >= 2
    assert "stock dcp.save" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["tape"], ["--local-mib", "100"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        storage.main(arguments)
