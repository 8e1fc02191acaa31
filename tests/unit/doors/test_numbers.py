"""What the elements of tensors are like, and how far two checkpoints are apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dist_ckpt
from dist_ckpt.doors import numbers
from dist_ckpt.errors import IntegrityError, UsageError

ODD = {
    "float": torch.tensor([[1.0, math.nan], [-math.inf, 3.0]]),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "tiny": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
    "wide": torch.tensor([2**62, -5]),
    "mask": torch.tensor([True, False, True]),
    "complex": torch.tensor([3 + 4j, 0j]),
    "nothing": torch.empty(0, 3),
    "none": torch.tensor([math.nan, math.nan]),
    "one": torch.tensor(7.0),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PIECE_BYTES", 1 << 12)


def test_each_dtype_has_numbers(tmp_path: Path) -> None:
    dist_ckpt.save({"model": ODD}, tmp_path)
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        found = numbers.tensor_stats(opened, numbers.matching(opened, ["model/*"]))
        rows = {
            each.name.removeprefix("model/value."): (
                *(each.least, each.most, each.mean),
                *(each.nans, each.infs),
            )
            for each in found
        }
    assert rows == {
        "float": (1.0, 3.0, 2.0, 1, 1),
        "half": (-2.0, 1.5, -0.25, 0, 0),
        "tiny": (0.5, 2.0, 1.25, 0, 0),
        "wide": (-5, 2**62, (2**62 - 5) / 2, 0, 0),
        "mask": (False, True, 2 / 3, 0, 0),
        "complex": (0.0, 5.0, 2.5, 0, 0),
        "nothing": (None, None, None, 0, 0),
        "none": (None, None, None, 2, 0),
        "one": (7.0, 7.0, 7.0, 0, 0),
    }


@pytest.mark.usefixtures("small_pieces")
def test_pieces_come_to_the_same_as_the_whole(tmp_path: Path) -> None:
    values = {f"w{n}": torch.randn(7 * n + 1, 13, 3) for n in range(20)}
    dist_ckpt.save({"model": values}, tmp_path)
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        found = list(numbers.tensor_stats(opened, [f"model/value.{name}" for name in values]))
    for each, tensor in zip(found, values.values(), strict=True):
        assert (each.least, each.most) == (tensor.min().item(), tensor.max().item())
        assert each.mean == pytest.approx(tensor.double().mean().item())


@pytest.mark.usefixtures("small_pieces")
def test_how_far_two_are_apart(tmp_path: Path) -> None:
    state = {"a": torch.randn(3000), "b": torch.randn(50, 50), "c": torch.tensor([1 + 1j, 2])}
    dist_ckpt.save({"model": state}, tmp_path, step=1)
    state["a"][[5, 2999]] += torch.tensor([0.25, -1.0])
    state["b"][0, 0] = math.nan
    state["c"].conj_physical_()
    dist_ckpt.save({"model": state}, tmp_path, step=2)
    names = [f"model/value.{name}" for name in state]
    with (
        dist_ckpt.open_checkpoint(tmp_path, step=1) as one,
        dist_ckpt.open_checkpoint(tmp_path, step=2) as other,
    ):
        a, b, c = numbers.value_differences(one, other, names)
        again = list(numbers.value_differences(other, other, names))
    assert (a.differing, b.differing, c.differing) == (2, 1, 1)
    assert a.absolute == pytest.approx(1.0, abs=1e-6)
    assert (b.absolute, b.relative) == (math.inf, math.inf)
    assert c.absolute == 2.0
    assert c.relative == pytest.approx(math.sqrt(2))
    assert [each.differing for each in again] == [0, 0, 0], "NaN equals NaN"


def test_a_pattern_that_matches_nothing_offers_names(tmp_path: Path) -> None:
    dist_ckpt.save({"model": torch.nn.Linear(1, 1, bias=False)}, tmp_path)
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        assert numbers.matching(opened, []) == ["model/weight"]
        assert numbers.matching(opened, ["w*", "model/*"]) == ["model/weight"]
        with pytest.raises(UsageError, match="did you mean 'weight'"):
            numbers.matching(opened, ["wieght"])


def test_no_number_is_said_of_damaged_bytes(tmp_path: Path) -> None:
    dist_ckpt.save({"model": {"w": torch.ones(1000)}}, tmp_path)
    (file,) = tmp_path.rglob("model.*")
    data = np.fromfile(file, dtype=np.uint8)
    data[-1] ^= 1
    data.tofile(file)
    with dist_ckpt.open_checkpoint(tmp_path) as opened, pytest.raises(IntegrityError):
        list(numbers.tensor_stats(opened, ["model/value.w"]))
