"""When to save."""

from __future__ import annotations

import math
import operator
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt import keep, policy
from dist_ckpt.errors import UsageError
from dist_ckpt.policy import Moment, SavePolicy, Scope
from dist_ckpt.repository.ranking import Criterion

LOSS = Criterion("loss")


@given(st.integers(1, 1000), st.integers(0, 10**9))
def test_multiples_are_due(steps: int, step: int) -> None:
    assert (policy.every(steps).due(Moment(step)) is not None) is (step % steps == 0)


@given(st.integers(0, 10**9))
def test_never_is_never(step: int) -> None:
    assert policy.never().due(Moment(step, epoch=1, seconds=1e9, signal="SIGTERM")) is None


def test_steps_are_asked_about_once_and_not_at_the_end_of_the_epoch_again() -> None:
    assert policy.every(5).due(Moment(10)) == "every 5 steps"
    assert policy.every(5).due(Moment(10, epoch=2)) is None


def test_ends_of_epochs() -> None:
    due = [policy.every(epochs=2).due(Moment(7, epoch=epoch)) for epoch in (None, 1, 2, 4)]
    assert due == [None, None, "end of epoch 2", "end of epoch 4"]


def test_given_steps_and_the_last() -> None:
    when = policy.at(1, 10) | policy.last(25)
    assert [step for step in range(30) if when.due(Moment(step))] == [1, 10, 25]
    assert when.due(Moment(25)) == "last step"
    assert str(when) == "policy.at(1, 10) | policy.last(25)"


def test_seconds_since_the_last_save() -> None:
    assert policy.every(seconds=60).due(Moment(3, seconds=59.9)) is None
    assert policy.every(seconds=60).due(Moment(3, seconds=60.0)) == "every 60 s"


@pytest.mark.parametrize(
    ("value", "best", "due"),
    [
        (1.0, None, True),
        (1.0, 2.0, True),
        (2.0, 2.0, False),
        (3.0, 2.0, False),
        (math.nan, None, False),
        (math.nan, 2.0, False),
        (math.inf, None, True),
    ],
)
def test_better_means_strictly_better_and_never_nan(
    value: float, best: float | None, due: bool
) -> None:
    before = {} if best is None else {LOSS: best}
    moment = Moment(5, metrics={"loss": value}, best=before)
    assert (policy.better("loss").due(moment) is not None) is due
    # For "max" the other way round; another criterion of the same metric has a best of its own.
    flipped = Moment(
        5,
        metrics={"loss": -value},
        best={Criterion("loss", "max"): -before[LOSS]} if before else {},
    )
    assert (policy.better("loss", mode="max").due(flipped) is not None) is due
    assert policy.better("other").due(moment) is None


def test_signals_by_name() -> None:
    when = policy.on_signal(signal.SIGTERM, signal.SIGUSR1)
    assert when.due(Moment(1, signal="SIGUSR1")) == "signal SIGUSR1"
    assert when.due(Moment(1, signal="SIGUSR2")) is None
    assert when.due(Moment(1)) is None
    assert policy.on_signal() == policy.on_signal(signal.SIGTERM)


def test_notices_are_heeded_as_signals_are() -> None:
    when = policy.on_notice(Path("/run/notice"), grace_seconds=30) | policy.on_signal()
    assert when.due(Moment(1, signal="notice")) == "notice"
    assert when.due(Moment(1, signal="SIGTERM")) == "signal SIGTERM"
    assert when.due(Moment(1)) is None
    # Of the two only the notice says how much time there is.
    late = {"waited_seconds": 20.0, "save_seconds": 11.0}
    assert when.due(Moment(1, signal="notice", **late)) is None  # type: ignore[arg-type]
    assert when.due(Moment(1, signal="SIGTERM", **late)) == "signal SIGTERM"  # type: ignore[arg-type]
    assert str(policy.on_notice("http://u:p@host/x?key=1", exit_code=3)) == (
        "policy.on_notice('http://***@host/x?***', every=5, exit_code=3)"
    )
    assert str(policy.on_signal(grace_seconds=90)) == "policy.on_signal(SIGTERM, grace_seconds=90)"


def test_all_reasons_are_told() -> None:
    when = policy.every(5) | policy.every(seconds=1) | policy.every(3)
    assert when.due(Moment(15, seconds=2.0)) == "every 5 steps, every 1 s, every 3 steps"
    assert len(policy.members(when)) == 3
    assert policy.every(5) | policy.every(3) == policy.every(5) | policy.every(3), "pure values"


@pytest.mark.parametrize(
    "join",
    [
        operator.and_,
        operator.add,
        operator.xor,
        operator.sub,
        operator.mul,
        lambda one, other: sum([one, other]),
        lambda one, other: 5 & (one | other),
        lambda one, other: ~(one | other),
    ],
)
@pytest.mark.parametrize(
    "pair",
    [
        (policy.every(5), policy.on_signal()),
        (policy.never(), policy.every(5) | policy.at(1)),
        (keep.latest(3), keep.best("loss")),
        (keep.latest(3) | keep.all(), policy.every(5)),
    ],
)
def test_policies_add_up_and_are_joined_by_nothing_else(
    join: Callable[[Any, Any], object], pair: tuple[Any, Any]
) -> None:
    with pytest.raises(UsageError, match="add up"):
        join(*pair)


@pytest.mark.parametrize("given", [5, None, policy.every])
def test_what_is_no_policy_is_named_on_whichever_side_it_stands(given: Any) -> None:
    for joined in (given | policy.every(3), given | (policy.every(3) | policy.at(1))):
        with pytest.raises(UsageError, match=f"takes a policy .* not {re.escape(repr(given))}"):
            policy.checked_when(joined)


@pytest.mark.parametrize(
    ("when", "scope"),
    [
        (policy.every(5) | policy.every(epochs=1) | policy.at(3), Scope.LOCAL),
        (policy.every(5) | policy.every(seconds=9), Scope.AHEAD),
        (policy.on_signal(), Scope.AHEAD),
        (policy.every(seconds=9) | policy.better("loss") | policy.every(5), Scope.AT_ONCE),
        (policy.never(), Scope.LOCAL),
    ],
)
def test_what_needs_the_word_of_rank_0(when: SavePolicy, scope: Scope) -> None:
    assert when.scope is scope


@pytest.mark.parametrize("steps", [0, -5, True, 2.0, "10"])
def test_what_is_no_number_of_steps(steps: object) -> None:
    with pytest.raises(UsageError, match="positive integer"):
        policy.every(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (policy.every, "one of"),
        (lambda: policy.every(5, seconds=5), "one of"),
        (lambda: policy.every(seconds=0), "above 0"),
        (lambda: policy.every(seconds=math.nan), "above 0"),
        (lambda: policy.every(seconds=math.inf), "above 0"),
        (lambda: policy.every(seconds="60"), "above 0"),  # type: ignore[arg-type]
        (lambda: policy.every(epochs=0), "positive integer"),
        (policy.at, "at least one step"),
        (lambda: policy.at(5, -1), "integer from 0"),
        (lambda: policy.last(True), "integer from 0"),
        (lambda: policy.better("loss", mode="lower"), "'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: policy.on_signal(signal.SIGKILL), "nobody can catch"),
        (lambda: policy.on_signal(9999), "takes signals"),
        (lambda: policy.on_signal(True), "takes signals"),
        (lambda: policy.on_signal(15.0), "takes signals"),  # type: ignore[arg-type]
        (lambda: policy.on_signal("TERM"), "takes signals"),  # type: ignore[arg-type]
        (lambda: policy.on_signal(grace_seconds=0), "grace_seconds must be"),
        (lambda: policy.on_signal(exit_code=256), "exit_code must be an integer from 0 to 255"),
        (lambda: policy.on_signal(exit_code=True), "exit_code must be"),
        (lambda: policy.on_notice(""), "a path, or a URL of HTTP"),
        (lambda: policy.on_notice("s3://bucket/notice"), "a path, or a URL of HTTP"),
        (lambda: policy.on_notice("/run/notice", every=-1), "every must be"),
    ],
)
def test_bad_policies(make: Callable[[], SavePolicy], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_signal_may_be_a_number() -> None:
    assert str(policy.on_signal(int(signal.SIGTERM))) == "policy.on_signal(SIGTERM)"
    of_numpy: Any = np.int64(signal.SIGTERM)
    assert policy.on_signal(of_numpy) == policy.on_signal(signal.SIGTERM)
