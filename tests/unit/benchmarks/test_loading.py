"""The benchmark of loads still runs, says what it could not measure, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import load_jobs, load_planning, loading
from benchmarks.load_alone import measure_alone
from benchmarks.load_jobs import Reshard
from benchmarks.loads import OURS, STOCK, make
from benchmarks.workload import State

TINY = 0.0001


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchsnapshot", "torch_checkpointing"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails from now on


@pytest.mark.usefixtures("without_peers")
def test_loads_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cold", "planning", "--place", str(tmp_path / "place"), "--repeats", "1"]
    assert loading.main([*arguments, "--scale", str(TINY)]) in (0, 1)
    text = capsys.readouterr().out
    assert text.count("NOT MEASURED") == 2
    for name in ("raw limit", OURS, STOCK):
        assert f"\n  {name} " in text
    for what in ("cold load, 1 rank, verified / raw limit", "seconds to plan, one rank alone"):
        assert any(line.startswith(what) for line in text.splitlines())
    assert list((tmp_path / "place").iterdir()) == []


def test_memory_above_the_target_is_within_its_bound(tmp_path: Path) -> None:
    scale = 0.01
    state = State(scale)
    make(OURS, tmp_path, state).save()
    # Of so little the samples may see nothing: what was free before takes it.
    assert 0 <= measure_alone(OURS, tmp_path, scale=scale) < 320 << 20


def test_bytes_of_all_ranks(tmp_path: Path) -> None:
    shapes = ((300, 1024), (77, 4099))  # 1.2 MiB each
    case = Reshard("FSDP2 1 -> 2", ("fsdp", 1), ("fsdp", 2))
    found = load_jobs.reshard(tmp_path, case, shapes)
    assert found.wanted == sum(4 * rows * columns for rows, columns in shapes)
    assert found.wanted <= found.ours < 1.1 * found.wanted
    assert found.stock > 1.9 * found.wanted, "each rank of stock reads whole chunks"


def test_planning_finds_what_one_rank_wants() -> None:
    for plan in load_planning.shares(load_planning.index_bytes(3, 40)).values():
        assert plan() > 0


@pytest.mark.parametrize("arguments", [["speed"], ["--scale", "2"], ["--repeats", "0"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        loading.main(arguments)
