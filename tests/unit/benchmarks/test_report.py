"""The page of `make bench-scale`: a verdict for each bound, and each curve with its exponent."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale.index import Sizes
from benchmarks.scale.load_rounds import Row as Load
from benchmarks.scale.planning import Row as Plan
from benchmarks.scale.report import LARGEST, PICTURE, Curve, Measured, verdicts, write
from benchmarks.scale.rounds import RANKS
from benchmarks.scale.rounds import Row as Round

ROUNDS = [
    Round("empty round", 64, 0.02, 0.01, 0.1, 2.0, 78.0),
    Round("empty round", RANKS, 0.5, 0.02, 1.0, 2.0, 78.0, is_met=True),
    Round("all others wait for rank 0", 4096, 60.0, 0.06, 0.0, 0.0, 0.0, is_met=True),
]
PLANS = [
    Plan("7B", 64, 1000, 1.0, 10.0, 900.0, 1000.0, 5),
    Plan("7B", LARGEST, 256_000, 16.0, 8192.0, 900.0, 1000.0, 5),
    Plan("70B", LARGEST, 256_000, 20.0, 100.0, 900.0, 1000.0, 5),
]
INDEXES = [Sizes(LARGEST, 1000, 3.0, 200.0, 300 << 10, 11 << 10, 0.5)]
LOADS = [Load("restore", 2, 5, 600.0), Load("restore", 32, 7, 640.0)]
MEASURED = Measured(ROUNDS, PLANS, INDEXES, load_rounds=LOADS)


def test_a_bound_that_is_missed_says_by_how_much_and_where() -> None:
    found = {each.figure: each for each in verdicts(MEASURED)}
    assert found["first plan, memory"].text.endswith(
        "| 4,096 MiB | 8,192 MiB (7B) | MISSED, 2.0 times the bound |"
    )
    assert found["first plan, CPU"].text.endswith("| 60 s | 20 s (70B) | met |")
    assert found["load, rounds"].text.endswith(
        "| 7 (restore, 32 ranks) | MISSED, 1.2 times the bound |"
    )
    missed = [each.figure for each in found.values() if each.is_missed]
    assert missed == ["first plan, memory", "load, rounds"]


def test_what_was_not_measured_at_the_largest_size_is_no_verdict() -> None:
    found = {each.figure: each for each in verdicts(Measured([], PLANS[:1], []))}
    assert {each.share for each in found.values()} == {None}
    assert "not measured" in found["first plan, CPU"].text


def test_the_exponent_is_that_of_the_last_two() -> None:
    assert Curve("a", [(1, 5.0), (10, 1.0), (1000, 100.0)]).exponent == pytest.approx(1.0)
    assert Curve("a", [(1, 5.0)]).label == "a"
    assert Curve("a", [(64, 0.0), (1024, 1.0)]).exponent is None


def test_page_and_plot_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write(MEASURED, page)
    text = page.read_text()
    assert "| first plan, CPU s | 7B | 64: 1, 16,384: 16 | 0.50 |" in text
    assert "| load, B a rank | restore | 2: 600, 32: 640 | 0.02 |" in text
    assert f"]({PICTURE})" in text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
