"""When to stop, and that the counts are part of the state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt import EarlyStopping
from dist_ckpt.errors import IncompatibleError, UsageError

VALUES = st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), max_size=20)


def test_stops_after_looks_that_were_no_better() -> None:
    stopper = EarlyStopping("loss", patience=2, min_delta=0.1)
    told = [stopper.update(step, value) for step, value in enumerate([3.0, 2.0, 1.95, 1.8, 1.75])]
    assert told == [True, True, False, True, False]
    assert (stopper.best_score, stopper.best_step, stopper.should_stop) == (1.8, 3, False)
    stopper.update(5, math.nan)  # a look like any other, and no better
    assert stopper.should_stop


def test_larger_may_be_better() -> None:
    stopper = EarlyStopping("f1", patience=1, mode="max")
    assert [stopper.update(step, value) for step, value in enumerate([0.5, 0.7, 0.7])] == [
        True,
        True,
        False,
    ]
    assert stopper.should_stop


@given(VALUES, st.integers(0, 20), st.integers(1, 4))
def test_an_interrupted_one_cannot_be_told_from_another(
    values: list[float], cut: int, patience: int
) -> None:
    whole = EarlyStopping("loss", patience=patience)
    before = EarlyStopping("loss", patience=patience)
    after = EarlyStopping("loss", patience=patience)
    for step, value in enumerate(values):
        whole.update(step, value)
        if step == cut:
            after.load_state_dict(before.state_dict())
        (before if step < cut else after).update(step, value)
    last = before if len(values) <= cut else after
    assert last.state_dict() == whole.state_dict()
    assert last.should_stop == whole.should_stop


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EarlyStopping("accuracy", patience=1).state_dict(), "'accuracy'"),
        (EarlyStopping("loss", patience=1, mode="max").state_dict(), "max"),
        ({"metric": "loss", "mode": "min"}, "best_score"),
    ],
)
def test_counts_of_another_metric_are_refused(other: dict[str, object], message: str) -> None:
    stopper = EarlyStopping("loss", patience=1)
    stopper.update(1, 2.0)
    with pytest.raises(IncompatibleError, match=message):
        stopper.load_state_dict(other)
    assert stopper.best_score == 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"patience": 0},
        {"patience": True},
        {"patience": 1, "min_delta": -1.0},
        {"patience": 1, "min_delta": math.nan},
        {"patience": 1, "min_delta": True},
        {"patience": 1, "mode": "best"},
    ],
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        EarlyStopping("loss", **arguments)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {"patience": np.int64(2), "min_delta": np.float32(0.5)}
    stopper = EarlyStopping("loss", **given)
    assert type(stopper.min_delta) is float
    assert stopper.min_delta == 0.5


COUNTS = {"metric": "loss", "mode": "min", "best_score": 2.0, "best_step": 1, "looks": 0}


@pytest.mark.parametrize(
    "other",
    [
        None,
        [("metric", "loss")],
        COUNTS | {"best_score": "2.0"},
        COUNTS | {"best_score": math.nan},
        COUNTS | {"best_score": None},
        COUNTS | {"best_step": 1.5},
        COUNTS | {"best_step": None},
        COUNTS | {"looks": None},
        COUNTS | {"looks": -1},
        COUNTS | {"looks": True},
    ],
)
def test_what_are_no_counts_is_refused(other: Any) -> None:
    stopper = EarlyStopping("loss", patience=1)
    stopper.update(1, 2.0)
    with pytest.raises(IncompatibleError, match="no counts of an EarlyStopping"):
        stopper.load_state_dict(other)
    assert stopper.state_dict() == COUNTS


@pytest.mark.parametrize(
    ("step", "value"), [(1, "low"), (1, None), (1, torch.ones(2)), (1.5, 2.0), (-1, 2.0)]
)
def test_a_look_at_what_is_no_metric_is_refused(step: Any, value: Any) -> None:
    stopper = EarlyStopping("loss", patience=1)
    with pytest.raises(UsageError, match=r"'loss' after step 1 is|bad step"):
        stopper.update(step, value)
    assert (stopper.best_score, stopper.looks) == (None, 0)
