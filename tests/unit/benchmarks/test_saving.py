"""The benchmark of saves still runs, says what it could not measure, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import jobs, saving
from benchmarks.alone import measure_alone
from benchmarks.peers import BACKGROUND, NAMES, OURS, STOCK
from benchmarks.workload import State

TINY = 0.0001


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchsnapshot", "torch_checkpointing"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails from now on


def test_state_is_that_of_gpt_2_small() -> None:
    shapes = State(TINY).model.state_dict()
    assert len(shapes) == 12 * 12 + 4  # weights and biases of each layer, and four beside
    parameters = 50257 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert 3 * 4 * parameters == pytest.approx(1.493e9, rel=1e-3)


@pytest.mark.soak
@pytest.mark.usefixtures("without_peers")
def test_saves_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["stall", "training", "--place", str(tmp_path / "place"), "--repeats", "1"]
    assert saving.main([*arguments, "--scale", str(TINY)]) in (0, 1)
    text = capsys.readouterr().out
    assert text.count("NOT MEASURED") == 2
    for name in set(NAMES) - {"torchsnapshot", "torch_checkpointing"}:
        assert f"\n  {name} " in text
    for what in ("against a memcpy", "against the raw limit", "against stock async_save"):
        assert f"{what}: " in text
    assert list((tmp_path / "place").iterdir()) == []


def test_under_dcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dcp", "--place", str(tmp_path), "--repeats", "1", "--scale", "0.001"]
    assert saving.main(arguments) in (0, 1)
    text = capsys.readouterr().out
    assert text.count("\nsave ") == text.count("\nload ") == 6
    assert list(tmp_path.iterdir()) == []


def test_first_save_and_memory(tmp_path: Path) -> None:
    found = measure_alone(OURS, tmp_path, scale=0.01, saves=4, watched=True)
    assert found.state_bytes > 10 << 20
    assert found.first_seconds > 0 < found.warm_seconds
    # The copy of the state is seen, so what a leak would take is seen too.
    assert found.late_bytes >= found.early_bytes > found.state_bytes // 2


def test_ranks(tmp_path: Path) -> None:
    shares = jobs.shares(tmp_path / "shares", 0.003)
    assert set(shares) <= set(BACKGROUND)
    assert 0.25 < shares[OURS].written < 0.5
    assert 0.25 < shares[OURS].staged < 0.5
    assert shares[STOCK].staged > 0.99
    exchange = jobs.exchange(tmp_path / "exchange", 20)
    assert exchange.nbytes > 0 < exchange.seconds


@pytest.mark.parametrize("arguments", [["speed"], ["--scale", "2"], ["--repeats", "0"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        saving.main(arguments)
