"""Averages of checkpoints, as a checkpoint or as an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dist_ckpt
from dist_ckpt.doors import image
from dist_ckpt.errors import AlreadyExists, IncompatibleError, NotFound, UsageError


@pytest.fixture(autouse=True)
def several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "WINDOW_BYTES", 4096)


def weights(step: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(50, 60, generator=made),
        "half": torch.randn(7, generator=made).bfloat16(),
        "z": torch.complex(*torch.randn(2, 5, generator=made)),
        "count": torch.tensor(step),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        dist_ckpt.save({"model": weights(step)}, tmp_path / "run", step=step)
    return tmp_path / "run"


def expected(shares: dict[int, float]) -> dict[str, torch.Tensor]:
    found = {step: weights(step) for step in shares}
    total: dict[str, torch.Tensor] = {"count": found[max(shares)]["count"]}
    for name in ("w", "half", "z"):
        wide = torch.complex128 if name == "z" else torch.float64
        parts = [share * found[step][name].to(wide) for step, share in shares.items()]
        total[name] = torch.stack(parts).sum(0).to(found[max(shares)][name].dtype)
    return total


def read(place: Path) -> dict[str, torch.Tensor]:
    with dist_ckpt.open_checkpoint(place) as opened:
        return {info.name: opened[name].read() for name, info in opened.info.items()}


def test_a_checkpoint_of_a_run(run: Path, tmp_path: Path) -> None:
    sources: list[Any] = [(run, 1), run / "step-0000000002", (run, "latest")]
    report = dist_ckpt.average(sources, tmp_path / "averaged")
    assert isinstance(report, dist_ckpt.doors.average.AverageReport)
    assert (report.step, report.was_there) == (3, False)
    found = read(tmp_path / "averaged")
    for name, tensor in expected(dict.fromkeys((1, 2, 3), 1 / 3)).items():
        torch.testing.assert_close(found[name], tensor)
    again = dist_ckpt.average(sources, tmp_path / "averaged")
    assert isinstance(again, dist_ckpt.doors.average.AverageReport)
    assert again.was_there
    with pytest.raises(AlreadyExists, match="is another checkpoint"):
        dist_ckpt.average(sources[:2], tmp_path / "averaged", step=3)


def test_an_export_by_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    weights: Any = np.array([1, 3], np.float32)
    dist_ckpt.average([(run, 1), (run, 3)], out, weights=weights, format="safetensors")
    found = load_file(out)
    for name, tensor in expected({1: 0.25, 3: 0.75}).items():
        torch.testing.assert_close(found[name], tensor)


def test_the_average_of_equal_ones_is_the_same_in_every_bit(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    dist_ckpt.average([(run, 2)] * 3, out, format="safetensors")
    dist_ckpt.export(run, tmp_path / "b.safetensors", step=2)
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_weight_of_nothing_takes_nothing(tmp_path: Path) -> None:
    for step, value in ((1, float("nan")), (2, 2.0)):
        state = {"model": {"w": torch.tensor([value])}}
        dist_ckpt.save(state, tmp_path / "run", step=step)
    sources: list[Any] = [(tmp_path / "run", step) for step in (1, 2)]
    dist_ckpt.average(sources, tmp_path / "out", weights=[0, 1])
    assert read(tmp_path / "out")["w"].item() == 2.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.zeros(2)}, "'b' of "),
        ({"w": torch.zeros(3), "b": torch.zeros(1)}, r"w is torch.float32\[2\] in .*float32\[3\]"),
        ({"w": torch.zeros(2).half(), "b": torch.zeros(1)}, r"float16\[2\]"),
    ],
)
def test_what_is_not_alike_has_no_average(
    other: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    dist_ckpt.save({"model": {"w": torch.zeros(2), "b": torch.zeros(1)}}, tmp_path / "a")
    dist_ckpt.save({"model": other}, tmp_path / "b")
    with pytest.raises(IncompatibleError, match=message):
        dist_ckpt.average([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "two checkpoints or more"),
        (2, {"weights": [1.0]}, "2 checkpoints have 2 weights"),
        (2, {"weights": [1, -1]}, "not negative, and not all 0"),
        (2, {"weights": [0, 0]}, "not negative, and not all 0"),
        (2, {"weights": [True, False]}, "not negative, and not all 0"),
        (2, {"weights": ["1", "2"]}, "weights are numbers"),
        (2, {"max_shard": 5}, "give its format="),
        (2, {"format": "safetensors", "step": 3}, "step: that is of a run"),
        (2, {"weigths": [1, 1]}, r"unknown option 'weigths'.* an average knows"),
        (2, {"part": "ema"}, "no part 'ema'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    count: int, options: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    sources: list[Any] = [(run, step) for step in range(1, count + 1)]
    with pytest.raises((UsageError, NotFound), match=message):
        dist_ckpt.average(sources, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
