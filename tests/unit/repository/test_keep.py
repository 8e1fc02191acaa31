"""Retention policies, and what may go by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.repository import keep
from dist_ckpt.repository.collect import removable

STEPS = st.lists(st.integers(0, 50), unique=True)


@given(STEPS, st.integers(1, 60))
def test_latest_keeps_the_newest(steps: list[int], count: int) -> None:
    kept = keep.latest(count).kept(sorted(steps))
    assert sorted(kept, reverse=True) == sorted(steps, reverse=True)[:count]
    assert all(kept.values()), "each has a reason"


@given(STEPS, st.integers(1, 60), st.sets(st.integers(0, 50)))
def test_what_goes_is_neither_kept_nor_protected_nor_the_newest(
    steps: list[int], count: int, protected: set[int]
) -> None:
    policy = keep.latest(count)
    going = removable(steps, policy, protected)
    assert set(going) == set(steps) - set(sorted(steps)[-count:]) - protected
    assert max(steps, default=None) not in going
    assert list(going) == sorted(going), "the oldest goes first"


class KeepNothing:
    def kept(self, steps: Sequence[int]) -> Mapping[int, str]:
        return {}


@given(STEPS)
def test_the_newest_stays_whatever_a_policy_says(steps: list[int]) -> None:
    assert set(removable(steps, KeepNothing(), ())) == set(sorted(steps)[:-1])


def test_the_reason_names_the_policy() -> None:
    assert removable([1, 2], keep.latest(1), ()) == {1: "not kept by keep.latest(1)"}


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "2", None])
def test_a_bad_count(count: object) -> None:
    with pytest.raises(UsageError, match="positive"):
        keep.latest(count)  # type: ignore[arg-type]
