"""Retention policies, and what may go by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.repository import keep
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Mode
from dist_ckpt.repository.repository import removable

DAY = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = st.lists(st.integers(0, 50), unique=True)
LOSSES = st.one_of(st.just(math.nan), st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf]))


def record(
    step: int,
    *,
    loss: float | None = None,
    epoch: int | None = None,
    hours: float = 0.0,
    trained: float | None = None,
) -> Record:
    """Return a record: created `hours` after midnight, after `trained` hours of training."""
    metrics = {} if loss is None else {"loss": loss}
    elapsed = None if trained is None else 3600 * trained
    created = DAY + timedelta(hours=hours)
    return Record(step, created, epoch=epoch, metrics=metrics, elapsed_seconds=elapsed)


def kept(policy: KeepPolicy, *records: Record) -> list[int]:
    return sorted(policy.kept(sorted(records, key=lambda each: each.step)))


@given(STEPS, st.integers(1, 60))
def test_latest_keeps_the_newest(steps: list[int], count: int) -> None:
    found = keep.latest(count).kept([record(step) for step in sorted(steps)])
    assert sorted(found, reverse=True) == sorted(steps, reverse=True)[:count]
    assert all(found.values()), "each has a reason"


@given(
    st.dictionaries(st.integers(0, 50), LOSSES), st.integers(1, 5), st.sampled_from(["min", "max"])
)
def test_best_keeps_the_best_and_of_equals_the_older(
    losses: dict[int, float], count: int, mode: Mode
) -> None:
    found = keep.best("loss", count, mode=mode).kept(
        [record(step, loss=loss) for step, loss in sorted(losses.items())]
    )
    known = {step: loss for step, loss in losses.items() if not math.isnan(loss)}
    assert len(found) == min(count, len(known))
    for step in found:
        for other in known.keys() - found.keys():
            sign = 1 if mode == "min" else -1
            assert (sign * known[step], step) < (sign * known[other], other)


def test_a_checkpoint_without_the_metric_is_never_a_best() -> None:
    records = [record(1), record(2, loss=math.nan), record(3, loss=5.0)]
    assert kept(keep.best("loss", 3), *records) == [3]
    assert keep.best("loss", 2).kept([record(3, loss=5.0)]) == {3: "best loss #1"}


@given(STEPS, st.integers(1, 20))
def test_every_keeps_the_last_of_each_stretch(steps: list[int], every: int) -> None:
    found = kept(keep.every(every), *map(record, steps))
    for step in steps:
        # From each checkpoint on, one is kept before the next multiple is passed.
        multiple = -(-step // every) * every
        assert any(step <= other <= multiple for other in found)
    assert set(found) >= {step for step in steps if step % every == 0}
    assert len(found) == len({-(-step // every) for step in steps})


def test_every_epoch_counts_only_the_ends_of_epochs() -> None:
    records = [record(10 * n, epoch=n) for n in range(1, 8)] + [record(75)]
    assert kept(keep.every(epochs=3), *records) == [30, 60, 70]


def test_age_is_what_was_stored_and_never_what_this_clock_says() -> None:
    records = [record(step, hours=step) for step in range(5)]
    assert kept(keep.newer_than(timedelta(hours=2)), *records) == [3, 4]
    assert kept(keep.newer_than(7200.0), *records) == [3, 4]
    of_numpy: Any = np.int64(7200)
    assert kept(keep.newer_than(of_numpy), *records) == [3, 4]


@pytest.mark.parametrize("jump", [-9, 9])
def test_a_host_whose_clock_is_hours_off_makes_nothing_old(jump: int) -> None:
    # The run moved to another host after step 2, and trained on for two hours.
    before = [record(step, hours=step, trained=step) for step in (1, 2)]
    after = [record(step, hours=step + jump, trained=step) for step in (3, 4)]
    found = kept(keep.newer_than(timedelta(hours=2.5)), *before, *after)
    assert set(found) >= {2, 3, 4}
    if jump > 0:
        assert found == [2, 3, 4]  # what both clocks call old goes all the same


def test_a_wrong_clock_of_long_ago_changes_nothing_now() -> None:
    ahead = record(1, hours=1000)
    records = [record(step, hours=step) for step in (2, 3, 4)]
    assert kept(keep.newer_than(timedelta(hours=1.5)), ahead, *records) == [1, 3, 4]


@given(STEPS, st.integers(1, 60), st.sets(st.integers(0, 50)))
def test_what_goes_is_neither_kept_nor_protected_nor_the_newest(
    steps: list[int], count: int, protected: set[int]
) -> None:
    going = [
        each.step for each in removable([record(s) for s in steps], keep.latest(count), protected)
    ]
    assert set(going) == set(steps) - set(sorted(steps)[-count:]) - protected
    assert max(steps, default=None) not in going
    assert going == sorted(going), "the oldest goes first"


class KeepNothing:
    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        return {}


@given(STEPS)
def test_the_newest_stays_whatever_a_policy_says(steps: list[int]) -> None:
    going = removable([record(step) for step in steps], KeepNothing(), ())
    assert {each.step for each in going} == set(sorted(steps)[:-1])


def test_policies_compose_and_say_why() -> None:
    policy = keep.latest(1) | keep.best("loss", 1, mode="max") | keep.every(10)
    records = [record(10, loss=1.0), record(12, loss=3.0), record(14, loss=3.0)]
    assert policy.kept(records) == {
        10: "every 10 steps",
        12: "best loss #1",
        14: "latest #1, every 10 steps",
    }
    assert str(policy) == "keep.latest(1) | keep.best('loss', 1, mode='max') | keep.every(10)"
    assert keep.latest(1) | keep.all() == keep.latest(1) | keep.all(), "pure values"
    assert kept(keep.all(), *records) == [10, 12, 14]


def test_a_policy_of_the_user_composes_too() -> None:
    mine = keep.either(KeepNothing(), keep.latest(1))
    assert kept(mine, record(1), record(2)) == [2]
    assert kept(keep.latest(1) | KeepNothing(), record(1), record(2)) == [2]
    assert kept(KeepNothing() | keep.latest(1), record(1), record(2)) == [2]


def test_criteria_are_those_of_the_bests() -> None:
    policy = keep.latest(1) | keep.best("loss") | keep.best("loss", 3) | keep.best("f1", mode="max")
    assert [str(each) for each in keep.criteria(policy)] == ["lowest loss", "highest f1"]
    assert keep.criteria(KeepNothing()) == ()


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        ("best", {"metric": "loss"}, [12]),
        ("last", {}, [15]),
        ("periodic", {"steps": 10}, [10, 15]),
        ("best_and_last", {"metric": "loss"}, [12, 15]),
        ("best_and_periodic", {"metric": "loss", "steps": 10, "mode": "max"}, [10, 15]),
    ],
)
def test_presets(name: str, arguments: dict[str, object], steps: list[int]) -> None:
    records = [record(10, loss=3.0), record(12, loss=1.0), record(15, loss=2.0)]
    assert kept(keep.preset(name, **arguments), *records) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keep.preset("bests"), "one of best, last"),
        (lambda: keep.preset("best"), "needs metric="),
        (lambda: keep.preset("last", metric="loss"), "takes no metric="),
        (lambda: keep.preset("best_and_periodic", metric="loss"), "needs steps="),
        (lambda: keep.best("loss", mode="low"), "'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: keep.best(""), "has a name"),
        (lambda: keep.best("loss", 0), "positive"),
        (lambda: keep.every(), "steps or epochs"),
        (lambda: keep.every(3, epochs=3), "steps or epochs"),
        (lambda: keep.every(epochs=0), "positive"),
        (lambda: keep.newer_than(0), "positive span"),
        (lambda: keep.newer_than(math.nan), "positive span"),
        (lambda: keep.newer_than(timedelta(days=-1)), "positive span"),
        (lambda: keep.newer_than("1d"), "timedelta or seconds"),  # type: ignore[arg-type]
    ],
)
def test_bad_policies(make: Callable[[], KeepPolicy], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "2", None])
def test_a_bad_count(count: object) -> None:
    with pytest.raises(UsageError, match="positive"):
        keep.latest(count)  # type: ignore[arg-type]
