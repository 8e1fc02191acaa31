"""The guide from torch.save is right: its Python runs, and what it says of the habits holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt.errors import AlreadyExists, CheckpointError, IncompatibleError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides

load: Any = dist_ckpt.load  # for what a type checker would not let pass

GUIDE = guides.guide("from-torch-save")

# What the text says of what its code does; it follows the code in the same program.
CLAIMS = """
def stored(run, name="model/0.weight"):
    with dist_ckpt.open_checkpoint(run) as opened:
        return opened[name].read()


assert first_epoch == 4
assert torch.equal(weights[0].weight, stored("runs/one"))
assert torch.equal(best[0].weight, stored("runs/loop", "ema/0.weight"))
with dist_ckpt.open_checkpoint("runs/loop") as opened:
    assert opened.read_values("counters") == {"value": {"samples": 20}}
assert loaded["phase"] is Phase.WARM_UP and loaded["tokens"].ids == [1, 2]
assert type(loaded["args"].out) is type(args.out)
assert not torch.equal(state_dict["model"]["0.weight"], stored("runs/dcp"))
assert torch.equal(state_dict["model"]["0.weight"], stored("runs/dcp/step-0000000010"))
for place in ("stock", "runs/converted"):
    model, optimizer = build()
    dist_ckpt.load({"model": model, "optimizer": optimizer}, place, only=["model", "optimizer"])
    moments = optimizer.state[model[0].weight]
    assert moments["step"] == 6 and moments["exp_avg"].any()
# The program ends here; the save is finished all the same.
dist_ckpt.async_save({"model": model}, "runs/ended", step=5)
"""


def test_python_runs(tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    said = guides.run(code + CLAIMS, tmp_path)
    assert "a copy" in said
    assert "Give the optimizer itself as a part" in said
    runs = {"loop": [3, 5], "converted": [3], "dcp": [10, 20], "ended": [5]}
    for run, steps in runs.items():
        assert Repository(resolve(tmp_path / "runs" / run)).steps() == steps, run


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


@pytest.fixture
def place(tmp_path: Path, model: nn.Module) -> Path:
    """A run with one checkpoint of `model` and its optimizer, under step 0."""
    dist_ckpt.save({"model": model, "optimizer": torch.optim.Adam(model.parameters())}, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("habit", "error", "says"),
    [
        (lambda m, p: dist_ckpt.save({"model": m}, p), AlreadyExists, "save under another step"),
        (lambda m, p: dist_ckpt.save({"model": m}, p / "a.pt"), UsageError, "not a directory"),
        (lambda m, p: dist_ckpt.save(m.state_dict(), p), UsageError, 'Give {"model": model}'),
        (lambda m, p: load({"m": m}, p, map_location="cpu"), UsageError, "device="),
        (lambda m, p: load({"m": m}, p, weights_only=True), UsageError, "weights_only"),
        (
            lambda m, p: dist_ckpt.load(
                {"optimizer": torch.optim.Adam(m.parameters()).state_dict()}, p
            ),
            UsageError,
            "a copy",
        ),
        (lambda m, p: dist_ckpt.save({"f": print}, p, step=1), UsageError, "register_type"),
        (
            lambda m, p: dist_ckpt.load(
                {"model": m, "optimizer": torch.optim.SGD(m.parameters())}, p
            ),
            IncompatibleError,
            "saved by torch.Adam, this is torch.SGD",
        ),
        (lambda m, p: dist_ckpt.load_weights(m[0], p, strict=False), IncompatibleError, "nothing"),
        (
            lambda m, p: dist_ckpt.load({"model": m, "rng": None}, p / "whole.pt"),
            CheckpointError,
            "neither a tensor nor a plain value, and there is nothing else",
        ),
    ],
)
def test_what_would_lose_something_is_refused(
    habit: Callable[[Any, Path], object],
    error: type[Exception],
    says: str,
    model: nn.Module,
    place: Path,
) -> None:
    torch.save(model.state_dict(), place / "a.pt")
    torch.save(model, place / "whole.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=re.escape(says)):
        habit(model, place)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert Repository(resolve(place)).steps() == [0]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_matched(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    named = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(named, tmp_path / "old.pt")
    fresh = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    dist_ckpt.load_weights(fresh, tmp_path / "old.pt")
    assert all(
        torch.equal(fresh.state_dict()[name], tensor) for name, tensor in model.state_dict().items()
    )


def test_values_of_an_old_file_are_read_by_name(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict(), "epoch": 3, "seed": [1]}, tmp_path / "old.pt")
    state = {"model": model, "epoch": 0}
    dist_ckpt.load(state, tmp_path / "old.pt", only=["model", "epoch"])
    assert state["epoch"] == 3
