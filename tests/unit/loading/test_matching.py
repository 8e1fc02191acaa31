"""What a state wants against what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.loading.fitting import Mismatches, can_cast, check_matched, compare, unmatched
from dist_ckpt.loading.loader import refuse_mismatches
from dist_ckpt.options import LoadOptions
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
    assert found.shapes == ["model/shape: stored float32[3, 2], wanted float32[2, 3]"]
    assert found.dtypes == ["model/dtype: stored float32[2], wanted bfloat16[2]"]
    assert found.casts == []
    cast = compare("model", targets, stored, cast=True)
    assert (cast.dtypes, cast.casts) == ([], found.dtypes)
    never = compare("m", {"n": torch.zeros(2)}, {"n": TensorSpec("int8", (2,))}, cast=True)
    assert never.dtypes == ["m/n: stored int8[2], wanted float32[2] (never cast)"]


@pytest.mark.parametrize(
    ("stored", "wanted", "possible"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float64, True),
        (torch.float32, torch.float8_e4m3fn, True),
        (torch.complex64, torch.complex128, True),
        (torch.complex64, torch.float32, False),
        (torch.float32, torch.complex64, False),
        (torch.int8, torch.int64, True),
        (torch.uint8, torch.int16, True),
        (torch.int64, torch.int32, False),
        (torch.int8, torch.uint8, False),
        (torch.uint8, torch.int8, False),
        (torch.float32, torch.int64, False),
        (torch.int64, torch.float64, False),
        (torch.bool, torch.int8, False),
        (torch.int8, torch.bool, False),
    ],
)
def test_what_may_be_cast(stored: torch.dtype, wanted: torch.dtype, possible: bool) -> None:
    assert can_cast(stored, wanted) is possible


@given(st.lists(st.tuples(NAMES, NAMES, NAMES, NAMES), min_size=1, max_size=4), st.booleans())
def test_missing_on_any_rank_and_unexpected_on_all(
    by_rank: list[tuple[list[str], list[str], list[str], list[str]]], strict: bool
) -> None:
    mismatches = [Mismatches(*each) for each in by_rank]
    missing = set().union(*(each[0] for each in by_rank))
    unexpected = set(by_rank[0][1]).intersection(*(each[1] for each in by_rank))
    shapes = set().union(*(each[2] for each in by_rank))
    dtypes = set().union(*(each[3] for each in by_rank))
    if not (shapes or dtypes or (strict and (missing or unexpected))):
        found = refuse_mismatches(mismatches, where="step 1 in x", strict=strict)
        assert (set(found.missing), set(found.unexpected)) == (missing, unexpected)
        return
    with pytest.raises(IncompatibleError) as caught:
        refuse_mismatches(mismatches, where="step 1 in x", strict=strict)
    message = str(caught.value)
    assert message.startswith("step 1 in x does not fit this state; nothing was changed")
    for kind, names in (
        ("missing in the checkpoint", missing),
        ("unexpected in the checkpoint", unexpected),
        ("of another shape", shapes),
        ("of another dtype", dtypes),
    ):
        listed = f"{kind}: {', '.join(sorted(names))}"
        assert (listed in message) is bool(names)
    assert caught.value.kind == ErrorKind.STATE_MISMATCH


def test_a_long_list_is_cut_and_counted() -> None:
    names = [f"model/layer{number:03d}" for number in range(1000)]
    with pytest.raises(IncompatibleError, match=r"model/layer019 and 980 more$"):
        refuse_mismatches([Mismatches(missing=names)], where="step 1")


def test_parts_that_were_never_saved_are_named_as_what_to_skip() -> None:
    found = Mismatches(missing=["rng"], unexpected=["step", "model/x"])
    with pytest.raises(IncompatibleError, match=r"skip=\['rng'\] leaves as it is"):
        refuse_mismatches([found], where="step 1")
    with pytest.raises(IncompatibleError) as caught:
        refuse_mismatches([Mismatches(missing=["model/x"])], where="step 1")
    assert "skip=[" not in str(caught.value)


def test_misfits_do_not_share_their_lists() -> None:
    one, other = Mismatches(), Mismatches()
    one.missing.append("x")
    assert other.missing == []


def test_a_pattern_counts_as_matched_when_it_matches_on_one_rank() -> None:
    options = LoadOptions(only=("model", "ema/*"), skip=("model/haed.*",))
    known = {"model", "model/head.weight", "model/body"}
    lost = unmatched(options, known, {"model/old"})
    assert lost == ["ema/*", "model/haed.*", "model/old"]
    mine = Mismatches(unmatched=lost)
    check_matched([mine, Mismatches()], known)
    with pytest.raises(UsageError, match=r"'model/haed\.\*'.*did you mean 'model/head'"):
        check_matched([mine, Mismatches(unmatched=["model/haed.*"])], known)


def test_a_pattern_without_its_part_is_explained() -> None:
    known = {"model", "model/head.weight"}
    lost = unmatched(LoadOptions(skip=("head.*",)), known, ())
    with pytest.raises(UsageError, match=r"names begin with their part.*'\*/head\.\*'"):
        check_matched([Mismatches(unmatched=lost)], known)


def test_what_leaves_everything_out_is_not_called_a_lack_of_common_names() -> None:
    with pytest.raises(IncompatibleError) as caught:
        refuse_mismatches([Mismatches(empty=["model"])], where="step 1")
    assert "nothing of model to load beside what only= and skip= leave out" in str(caught.value)
    assert "strict" not in str(caught.value)


def test_other_groups_of_an_optimizer_say_how_to_build_it() -> None:
    for found in (
        Mismatches(missing=["optimizer/param_groups.0.weight"]),
        Mismatches(unexpected=["optimizer/param_groups.0.weight[0.bias]"]),
    ):
        with pytest.raises(IncompatibleError, match="add_param_group included, before it is"):
            refuse_mismatches([found], where="step 1")


def test_the_message_offers_what_would_help() -> None:
    for found, ways in (
        (Mismatches(missing=["a"]), ("strict=False",)),
        (Mismatches(dtypes=["a"]), ("cast=True",)),
        (Mismatches(dtypes=["a (never cast)"]), ()),
        (Mismatches(shapes=["a"]), ()),
    ):
        with pytest.raises(IncompatibleError) as caught:
            refuse_mismatches([found], where="step 1")
        offered = [way for way in ("strict=False", "cast=True") if way in str(caught.value)]
        assert offered == list(ways)
