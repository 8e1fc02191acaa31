"""What a state wants against what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.engine.matching import Misfits, compare, judge
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.state.part import TensorSpec

NAMES = st.lists(st.sampled_from("abcdef"), unique=True)


def test_each_kind_of_difference_is_told_with_both_sides() -> None:
    targets = {
        "same": torch.zeros(2, 3),
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(2, dtype=torch.bfloat16),
        "new": torch.zeros(1),
    }
    stored = {
        "same": TensorSpec("float32", (2, 3)),
        "shape": TensorSpec("float32", (3, 2)),
        "dtype": TensorSpec("float32", (2,)),
        "old": TensorSpec("float32", (1,)),
    }
    found = compare("model", targets, stored)
    assert found.missing == ["model/new"]
    assert found.unexpected == [], "the part itself says what it does not know"
    assert found.mismatched == [
        "model/shape: stored float32[3, 2], wanted float32[2, 3]",
        "model/dtype: stored float32[2], wanted bfloat16[2]",
    ]


@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=1, max_size=4))
def test_missing_on_any_rank_and_unexpected_on_all(
    by_rank: list[tuple[list[str], list[str], list[str]]],
) -> None:
    misfits = [Misfits(*each) for each in by_rank]
    missing = set().union(*(each[0] for each in by_rank))
    unexpected = set(by_rank[0][1]).intersection(*(each[1] for each in by_rank))
    mismatched = set().union(*(each[2] for each in by_rank))
    if not (missing or unexpected or mismatched):
        judge(misfits, where="step 1 in x")
        return
    with pytest.raises(IncompatibleError) as caught:
        judge(misfits, where="step 1 in x")
    message = str(caught.value)
    assert message.startswith("step 1 in x does not fit this state; nothing was changed.")
    for kind, names in (
        ("missing in the checkpoint", missing),
        ("unexpected in the checkpoint", unexpected),
        ("of another shape or dtype", mismatched),
    ):
        listed = f"{kind}: {', '.join(sorted(names))}"
        assert (listed in message) is bool(names)
    assert caught.value.kind == ErrorKind.STATE_MISMATCH


def test_a_long_list_is_cut_and_counted() -> None:
    names = [f"model/layer{number:03d}" for number in range(1000)]
    with pytest.raises(IncompatibleError, match=r"model/layer019 and 980 more$"):
        judge([Misfits(missing=names)], where="step 1")


def test_misfits_do_not_share_their_lists() -> None:
    one, other = Misfits(), Misfits()
    one.missing.append("x")
    assert other.missing == []
