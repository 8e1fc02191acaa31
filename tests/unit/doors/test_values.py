"""In which Python values two checkpoints differ, each named by its path."""

from __future__ import annotations

import datetime
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

import dist_ckpt
from dist_ckpt import Run
from dist_ckpt.doors.values import value_changes
from dist_ckpt.testing.ranks import run_ranks

CONFIG = {
    "lr": 0.1,
    "name": "a",
    "layers": [1, 2, 3],
    "betas": (0.9, 0.95),
    "nested": {"deep": {"warm": True, 7: "seven"}},
    "seen": {1, 2},
    "counts": Counter({"a": 1}),
    "order": OrderedDict(a=1, b=2),
    "limit": math.inf,
    "since": datetime.date(2026, 1, 1),
    "many": list(range(100)),
}


def changes(folder: Path, one: Any, other: Any) -> dict[str, tuple[str, str]]:
    """Save two values and return by path what is said of each difference."""
    for step, value in enumerate((one, other), 1):
        dist_ckpt.save({"config": value}, folder, step=step)
    run = Run(str(folder))
    found = value_changes(run.open(1), run.open(2), run.diff_values(1, 2))
    return {each.path: (each.here, each.there) for each in found if each.part == "config"}


def test_equal_values_have_no_difference(tmp_path: Path) -> None:
    # A dict is equal in whatever order it was filled.
    assert changes(tmp_path, CONFIG, dict(reversed(CONFIG.items()))) == {}


def test_each_difference_is_named_by_its_path(tmp_path: Path) -> None:
    other = {
        **CONFIG,
        "lr": 0.01,
        "layers": [1, 5, 3],
        "betas": (0.9, 0.999),
        "nested": {"deep": {"warm": 1, 7: "eight"}},
        "seen": {1, 3},
        "counts": Counter({"a": 1, "b": 2}),
        "order": OrderedDict(b=2, a=1),
        "limit": math.nan,
        "since": datetime.date(2026, 1, 2),
        "many": [-1, *range(1, 99), 0],
        "new": None,
    }
    del other["name"]
    assert changes(tmp_path, CONFIG, other) == {
        "lr": ("0.1", "0.01"),
        "name": ("'a'", ""),
        "layers[1]": ("2", "5"),
        "betas[1]": ("0.95", "0.999"),
        "nested.deep.warm": ("True", "1"),
        "nested.deep[7]": ("'seven'", "'eight'"),
        "seen": ("{1, 2}", "{1, 3}"),
        "counts.b": ("", "2"),
        "order": ("OrderedDict(a=1, b=2)", "OrderedDict(b=2, a=1)"),
        "limit": ("inf", "nan"),
        "since": ("datetime.date(2026, 1, 1)", "datetime.date(2026, 1, 2)"),
        "many[0]": ("0", "-1"),
        "many[99]": ("99", "0"),
        "new": ("", "None"),
    }


def test_what_is_long_is_said_in_short(tmp_path: Path) -> None:
    one = {"text": "x" * 1000, "numbers": list(range(700)), "size": [1] * 50, "kind": {"a": 1}}
    other = {"text": "y" * 1000, "numbers": [-1] * 700, "size": [1] * 49, "kind": 3}
    found = changes(tmp_path, one, other)
    assert found["numbers[0] and 699 more"] == ("0", "-1")
    assert found["size"] == ("50 items", "49 items")
    assert found["kind"][1] == "3"
    assert all(len(text) <= 60 for pair in found.values() for text in pair)
    assert len(found) == 4


def test_a_value_that_is_no_dict_is_the_part_itself(tmp_path: Path) -> None:
    assert changes(tmp_path, 3, 4) == {"": ("3", "4")}


def test_state_of_a_training_is_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for step in (1, 2):
        dist_ckpt.save(state, tmp_path, step=step)
        optimizer.step()
        scheduler.step()
    run = Run(str(tmp_path))
    found = list(value_changes(run.open(1), run.open(2), run.diff_values(1, 2)))
    paths = {(each.part, each.path) for each in found}
    assert paths >= {
        ("scheduler", "last_epoch"),
        ("scheduler", "_last_lr[0]"),
        ("optimizer", "param_groups.weight.lr"),
    }


def save_by_rank(url: str) -> None:
    rank = torch.distributed.get_rank()
    for step in (1, 2):
        state = dist_ckpt.PerRank({"position": rank * step})
        dist_ckpt.save({"data": state}, url, step=step)


def test_ranks_with_values_of_their_own_are_told_apart(tmp_path: Path) -> None:
    run_ranks(2, save_by_rank, str(tmp_path))
    run = Run(str(tmp_path))
    found = list(value_changes(run.open(1), run.open(2), run.diff_values(1, 2)))
    said = [(e.part, e.rank, e.path, e.here, e.there) for e in found if e.part == "data"]
    assert said == [("data", 1, "position", "1", "2")]
